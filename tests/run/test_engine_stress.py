"""Random requests at a pool that forces preemption: none is lost, stuck or answered twice, and no block leaks."""

import random

import pytest

from satchel.core.request import Request, Sampling
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import toy_decoder

FINISHES = {"length", "stop", "cancelled", "deadline"}


def a_request(rng):
    prompt = rng.choice([(5, 6) * 20, (7,) * 33, ()]) + tuple(rng.randrange(4, 60) for _ in range(rng.randint(1, 25)))
    how = Sampling(temperature=rng.choice([0.0, 0.8]), top_k=rng.choice([0, 5]), seed=rng.choice([None, 3]))
    n = rng.choice([1, 1, 1, 3])
    return Request(
        prompt=prompt,
        max_tokens=rng.randint(1, 30),
        sampling=how,
        n=n,
        best_of=n + rng.choice([0, 0, 2]),
        stop_tokens=(rng.randrange(4, 60),),
        priority=rng.randint(0, 3),
        tenant=rng.choice("abc"),
        deadline_s=rng.choice([None, None, None, rng.uniform(1, 60)]),
    )


@pytest.mark.parametrize(
    ("admission", "preemption", "decoding"),
    [
        ("fcfs", "recompute", "plain"),
        ("priority", "fastswitch:size=1MiB", "lookup"),
        ("fair", "fastswitch:size=64KiB", "plain"),
        ("shortest", "recompute", "lookup"),
        ("deadline", "recompute", "plain"),
    ],
)
def test_every_request_ends_once_and_nothing_leaks(admission, preemption, decoding):
    serve_at_random(admission, preemption, decoding, 120)


@pytest.mark.slow
def test_of_thousands_of_requests_none_is_lost():
    serve_at_random("priority", "fastswitch:size=1MiB", "lookup", 5000)


def serve_at_random(admission, preemption, decoding, count):
    """Submit, cancel and step at random until all have ended; raises where the books are wrong."""
    rng, now = random.Random(admission), [0.0]
    limits = Limits(blocks=14, batch=6, step_tokens=24, context=112)
    model = toy_decoder(layers=1)
    engine = Engine(model, limits, admission=admission, preemption=preemption, decoding=decoding, clock=lambda: now[0])
    left, open_, ended, finished = count, {}, set(), {}
    while left or not engine.idle:
        for _ in range(min(left, rng.choice([0, 0, 1, 6]))):
            request = a_request(rng)
            open_[engine.submit(request)] = request
            left -= 1
        events = engine.cancel(rng.choice(list(open_))) if open_ and rng.random() < 0.05 else []
        for event in events + engine.step():
            assert event.id in open_ and event.id not in ended
            if event.finish:
                assert event.finish in FINISHES
                finished.setdefault(event.id, []).append(event.index)
            if event.usage:
                request = open_.pop(event.id)
                ended.add(event.id)
                assert sorted(finished[event.id]) == list(range(request.n))
        now[0] += 0.05
        if rng.random() < 0.1:
            engine.check_integrity()
    engine.check_integrity()
    stats = engine.stats()
    assert not open_ and len(ended) == count and stats["preemptions"] > 10
    assert stats["blocks_held"] == stats["waiting"] == stats["running"] == 0
