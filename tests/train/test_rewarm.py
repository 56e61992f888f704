import pytest
import torch

from satchel.core.errors import UserError
from satchel.train.cosine import Cosine
from satchel.train.rewarm import Rewarm
from tests.tolerances import TOLERANCE
from tests.train.common import factors


def test_the_climb_goes_on_from_where_the_last_run_ended_and_the_fall_ends_there():
    values = factors(Rewarm(warmup=0.1, start=0.25, final=0.25), 1000)
    assert values[0] == pytest.approx(0.25 + 0.75 / 101, rel=TOLERANCE[torch.float64])
    steps = [later - earlier for earlier, later in zip(values[:100], values[1:101], strict=True)]
    assert steps == pytest.approx([0.75 / 101] * 100, rel=TOLERANCE[torch.float32])
    assert values[100] == 1.0 and 0.25 < values[-1] < 0.2501


def test_behind_the_climb_it_is_a_cosine():
    assert factors(Rewarm(warmup=0.1))[20:] == factors(Cosine(warmup=0.1, final=0.1))[20:]


def test_from_nothing_it_is_a_cosine_throughout():
    assert factors(Rewarm(warmup=0.1, start=0.0)) == factors(Cosine(warmup=0.1, final=0.1))


def test_a_start_outside_its_range_is_refused():
    with pytest.raises(UserError, match="start=1.5 is outside"):
        Rewarm(start=1.5)
