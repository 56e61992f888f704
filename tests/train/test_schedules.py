import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from satchel.core.book import entries, make
from satchel.core.errors import UserError

SCHEDULES = [entry.name for entry in entries() if entry.slot == "schedule"]


def factors(spelling, steps=200):
    schedule = make("schedule", spelling)
    return [schedule.at(step, steps) for step in range(steps)]


def test_there_are_four():
    assert {"constant", "cosine", "linear", "wsd"} <= set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.99))
def test_factor_stays_above_0_and_peaks_at_1_after_an_even_climb(name, steps, warmup):
    schedule, climb = make("schedule", f"{name}:warmup={warmup}"), round(warmup * steps)
    values = [schedule.at(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert all(later > earlier for earlier, later in zip(values[: climb + 1], values[1 : climb + 1], strict=False))
    assert climb == steps or values[climb] == 1
    assert all(later <= earlier for earlier, later in zip(values[climb:], values[climb + 1 :], strict=False))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_without_warm_up_equals_transformers(name):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=200)
    for ours in factors(f"{name}:warmup=0"):
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_near_its_final_share(name):
    assert factors(f"{name}:final=0.25", steps=10_000)[-1] == pytest.approx(0.25, abs=1e-3)


def test_wsd_stays_at_the_peak_until_its_decay():
    values = factors("wsd:warmup=0,decay=0.25,final=0.5")
    assert values[:151] == [1.0] * 151
    assert values[175] == pytest.approx(0.75)


def test_constant_stays():
    assert factors("constant:warmup=0") == [1.0] * 200


@pytest.mark.parametrize("spelling", ["cosine:warmup=1", "linear:final=1.5", "wsd:decay=0", "constant:warmup=-0.1"])
def test_a_share_out_of_range_is_refused(spelling):
    with pytest.raises(UserError, match="is outside"):
        make("schedule", spelling)
