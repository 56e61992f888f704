import pytest
import torch
import transformers

from satchel.train.cosine import Cosine
from tests.tolerances import TOLERANCE
from tests.train.common import check_equals_transformers, factors


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_equals_transformers(final):
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup
    check_equals_transformers(Cosine(warmup=0, final=final), schedule, min_lr_rate=final)


def test_falls_slowly_at_both_ends_and_evenly_about_the_middle():
    """Half a cosine: what is lost by a step from the start is what is left by a step from the end."""
    values = [Cosine(final=0.25).after(i / 200) for i in range(201)]
    mirrored = [1.25 - value for value in reversed(values)]
    assert values == pytest.approx(mirrored, rel=TOLERANCE[torch.float64])
    falls = [earlier - later for earlier, later in zip(values, values[1:], strict=False)]
    assert falls[:100] == sorted(falls[:100]) and falls[0] < 0.02 * falls[100]


def test_ends_a_step_above_its_final_share():
    assert Cosine(final=0.25).after(1.0) == 0.25 < factors(Cosine(final=0.25))[-1] < 0.26
