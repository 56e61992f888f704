from satchel.serve.shortest import Shortest
from tests.serve.common import Slip, order


def test_the_shortest_answers_come_first():
    lengths = (40, 30, 3, 20, 2, 10)
    assert order("shortest:aging=0", [{"max_tokens": n} for n in lengths], batch=1) == [4, 2, 5, 3, 1, 0]


def test_a_long_prompt_counts():
    assert order("shortest:aging=0", [{"prompt": (5,) * 90, "max_tokens": 2}, {"max_tokens": 20}], batch=1) == [1, 0]


def test_whoever_waits_long_enough_comes_first():
    policy = Shortest(aging=10)
    long, short = Slip(arrival_s=0.0, remaining=500), Slip(arrival_s=60.0, remaining=5)
    assert policy.rank(long, 0, 60.0) < policy.rank(short, 0, 60.0)
    assert policy.rank(long, 0, 1.0) > policy.rank(Slip(arrival_s=1.0, remaining=5), 0, 1.0)
