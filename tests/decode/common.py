"""Engines that guess, beside one that does not."""

from satchel.core.request import Request, Sampling
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits

GREEDY, DRAWN = Sampling(), Sampling(temperature=0.7, top_p=0.95, seed=11)
REPEATED = Sampling(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3, seed=4)


def engine(model, decoding="plain", **limits):
    limits = {"blocks": 64, "batch": 6, "step_tokens": 64, "context": 256} | limits
    return Engine(model, Limits(**limits), decoding=decoding)


def answers(served, requests):
    """Tokens of each request."""
    ids = [served.submit(request) for request in requests]
    events = served.run()
    served.check_integrity()
    assert served.stats()["blocks_held"] == 0
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids]


def some_requests(how, count=8, tokens=40):
    """Prompts that repeat themselves, and some that do not."""
    prompts = [tuple(4 + (i * j) % (3 + 5 * (i % 3)) for j in range(12 + i)) for i in range(count)]
    return [Request(prompt=prompt, max_tokens=tokens - i, sampling=how) for i, prompt in enumerate(prompts)]
