from satchel.serve.deadline import Deadline
from tests.serve.common import Slip, order


def test_the_earliest_deadline_is_served_first_and_none_last():
    due = (None, 900.0, 500.0, 700.0, None)
    assert order("deadline", [{"deadline_s": d} for d in due], batch=1) == [2, 3, 1, 0, 4]


def test_an_earlier_deadline_displaces():
    policy = Deadline()
    assert policy.displaces(Slip(deadline_s=1.0), Slip(deadline_s=2.0))
    assert not policy.displaces(Slip(), Slip())
