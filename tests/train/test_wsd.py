import pytest
import torch

from satchel.train.linear import Linear
from satchel.train.wsd import WSD
from tests.tolerances import TOLERANCE
from tests.train.common import factors


def test_stays_at_the_peak_and_falls_evenly_over_its_decay():
    values = factors(WSD(warmup=0, decay=0.25, final=0.5))
    assert values[:151] == [1.0] * 151
    line = [1 - 0.5 * step / 50 for step in range(50)]
    assert values[150:] == pytest.approx(line, rel=TOLERANCE[torch.float64])


def test_a_run_can_be_prolonged_from_its_stable_part():
    """The paper's point: until it decays, a run of any length is the beginning of a longer one."""
    schedule = WSD(warmup=0)
    short, long = factors(schedule, 100), factors(schedule, 1000)
    assert short[:91] == long[:91] and short[91] < long[91]


def test_with_decay_throughout_it_is_the_straight_line():
    assert factors(WSD(decay=1.0)) == pytest.approx(factors(Linear()), rel=TOLERANCE[torch.float64])
