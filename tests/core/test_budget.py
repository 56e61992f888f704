import pytest

from satchel.core.budget import Budget
from satchel.core.errors import UserError


def test_a_budget_is_read_from_what_people_write():
    assert Budget.parse(memory="1.5GiB", time="10min") == Budget(memory_bytes=3 * 2**29, seconds=600)
    assert Budget.parse() == Budget()


def test_a_budget_names_the_limits_that_a_job_breaks():
    budget = Budget(memory_bytes=100, seconds=10)
    assert budget.exceeded(memory_bytes=100, seconds=10) == ()
    assert budget.exceeded(memory_bytes=101) == ("memory",)
    assert budget.exceeded(memory_bytes=101, seconds=11) == ("memory", "time")
    assert Budget().exceeded(memory_bytes=2**60, seconds=1e9) == ()


@pytest.mark.parametrize("limits", [{"memory_bytes": 0}, {"seconds": -1.0}])
def test_a_budget_of_nothing_is_refused(limits):
    with pytest.raises(UserError, match="leaves nothing"):
        Budget(**limits)


def test_a_budget_prints_its_limits():
    assert str(Budget.parse(memory="1.5GiB", time="90s")) == "1.50 GiB and 1 min 30 s"
    assert str(Budget()) == "no limit"
