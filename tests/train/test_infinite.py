import math

import pytest
import torch

from satchel.core.errors import UserError
from satchel.train.infinite import Infinite
from tests.tolerances import TOLERANCE
from tests.train.common import factors

EXACT = TOLERANCE[torch.float64]


@pytest.mark.parametrize("shape", ["cosine", "sqrt"])
def test_each_stretch_is_its_closed_form(shape):
    schedule = Infinite(warmup=0.0, cooldown=0.5, constant=0.55, anneal=0.2, final=0.1, shape=shape, bend=10.0)
    values = factors(schedule, 1000)
    for step in range(500):
        t = step / 500
        h = [1 / math.sqrt(1 + 10 * u) - 1 for u in (t, 1.0)]
        closed = 0.55 + 0.45 * (1 + math.cos(math.pi * t)) / 2 if shape == "cosine" else 1 - 0.45 * h[0] / h[1]
        assert values[step] == pytest.approx(closed, rel=EXACT)
    assert set(values[500:801]) == {0.55}
    for step in range(801, 1000):
        assert values[step] == pytest.approx(0.55 * (0.1 / 0.55) ** ((step - 800) / 200), rel=EXACT)


@pytest.mark.parametrize("shape", ["cosine", "sqrt"])
def test_the_stretches_meet_without_a_jump(shape):
    values = factors(Infinite(warmup=0.05, cooldown=0.4, anneal=0.3, shape=shape), 20_000)
    assert max(abs(later - earlier) for earlier, later in zip(values, values[1:], strict=False)) < 2e-3


def test_without_annealing_it_ends_where_the_next_run_begins():
    first, then = Infinite(), Infinite(warmup=0.0, cooldown=0.0, anneal=0.15)
    assert factors(first)[-1] == factors(then)[0] == 0.55
    assert factors(then, 1000)[:850] == [0.55] * 850 and 0.1 < factors(then, 1000)[-1] < 0.102


def test_the_square_root_falls_faster_at_first():
    cosine, root = (factors(Infinite(warmup=0.0, shape=shape)) for shape in ("cosine", "sqrt"))
    assert all(r < c for c, r in zip(cosine[1:60], root[1:60], strict=True))


@pytest.mark.parametrize(
    "knobs", [{"cooldown": 0.8, "anneal": 0.3}, {"final": 0.6}, {"constant": 0.0}, {"bend": 0.0}, {"anneal": -0.1}]
)
def test_stretches_that_do_not_fit_are_refused(knobs):
    with pytest.raises(UserError, match="infinite: "):
        Infinite(**knobs)
