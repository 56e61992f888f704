from satchel.serve.fcfs import Fcfs
from tests.serve.common import Slip, order


def test_who_came_first_is_served_first():
    assert order("fcfs", [{}] * 7) == list(range(7))


def test_nothing_but_the_time_of_arrival_counts():
    policy = Fcfs()
    early, late = Slip(arrival_s=1.0, remaining=1000), Slip(arrival_s=2.0, priority=9, deadline_s=3.0, remaining=1)
    assert policy.rank(early, 1e9, 5.0) < policy.rank(late, 0.0, 5.0)
    assert not policy.displaces(early, late) and not policy.displaces(late, early)
