"""Tickets for admissions, and an engine that says who came in which order."""

from dataclasses import dataclass

from satchel.core.request import Request
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import toy_decoder


@dataclass(frozen=True)
class Slip:
    arrival_s: float = 0.0
    priority: int = 0
    deadline_s: float = float("inf")
    remaining: int = 10


def order(admission, requests, **limits):
    """The requests' numbers in the order in which they ended, on a toy model that runs two at once."""
    limits = {"blocks": 64, "batch": 2, "step_tokens": 32, "context": 256} | limits
    engine = Engine(toy_decoder(), Limits(**limits), admission=admission)
    for fields in requests:
        engine.submit(Request(**({"prompt": (5, 6, 7), "max_tokens": 6} | fields)))
    ended = [event.id for event in engine.run() if event.usage]
    engine.check_integrity()
    assert sorted(ended) == list(range(len(requests)))
    return ended
