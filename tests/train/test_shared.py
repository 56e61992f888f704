"""What every learning-rate schedule does: the climb, the peak, the fall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satchel.core.book import entries, make
from satchel.core.errors import UserError

SCHEDULES = [entry.name for entry in entries() if entry.slot == "schedule"]


@pytest.mark.parametrize("name", SCHEDULES)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.99))
def test_factor_stays_above_0_and_peaks_at_1_after_an_even_climb(name, steps, warmup):
    schedule, climb = make("schedule", f"{name}:warmup={warmup}"), round(warmup * steps)
    values = [schedule.at(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    start = getattr(schedule, "start", 0.0)
    assert values[:climb] == [start + (1 - start) * ((step + 1) / (climb + 1)) for step in range(climb)]
    assert climb == steps or values[climb] == 1
    assert all(later <= earlier for earlier, later in zip(values[climb:], values[climb + 1 :], strict=False))


@pytest.mark.parametrize("spelling", ["cosine:warmup=1", "linear:final=1.5", "wsd:decay=0", "constant:warmup=-0.1"])
def test_a_share_out_of_range_is_refused(spelling):
    with pytest.raises(UserError, match="is outside"):
        make("schedule", spelling)
