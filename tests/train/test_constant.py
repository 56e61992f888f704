import pytest
import torch

from satchel.train.constant import Constant
from tests.tolerances import TOLERANCE
from tests.train.common import factors


def test_warm_up_is_gradual_and_the_peak_stays():
    """As in the paper: the same increment at every iteration, up to the peak, and no step from it."""
    values = factors(Constant(warmup=0.05), steps=200)
    increments = [later - earlier for earlier, later in zip([0.0, *values], values[:11], strict=False)]
    assert increments == pytest.approx([1 / 11] * 11, rel=TOLERANCE[torch.float64])
    assert values[10:] == [1.0] * 190


def test_without_warm_up_every_step_is_at_the_peak():
    assert factors(Constant(warmup=0)) == [1.0] * 200
