"""One way to make room in the pool, in a process of its own: python -m bench._switch_run '{"preemption": ..., ...}'."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bench._harness import median
from bench._serve_run import prompts
from bench._served import served_model
from satchel.core.request import Request
from satchel.model.source import find_source
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits

TOLD, SAID, ASKED = 192, 40, 24  # tokens: of a first turn, of an answer, of a later turn


@dataclass
class Talk:
    """A conversation: what was said, how many turns are left, and when its next tokens came."""

    tokens: list[int]
    turns: int
    asked_s: float = 0.0
    came_s: list[float] = field(default_factory=list)


def main(case: dict[str, Any]) -> dict[str, Any]:
    """Conversations whose priorities change with every turn, through a pool that holds a third of them."""
    model = served_model(find_source(case["model"]))
    limits = Limits(blocks=case["blocks"], batch=8, step_tokens=128, context=1024)
    engine = Engine(model, limits, admission="priority", preemption=case["preemption"])
    watch = Watch(engine)
    rng = random.Random(1)
    talks = [Talk(prompt, case["turns"]) for prompt in prompts(case["talks"], TOLD, 7)]
    engine.submit(Request(prompt=tuple(talks[0].tokens[:100]), max_tokens=4))
    engine.run()
    watch.stalls_s.clear()
    open_: dict[int, Talk] = {}
    first, between = [], []
    begun = time.monotonic()
    while open_ or any(talk.turns for talk in talks):
        for talk in talks:
            if talk.turns and talk not in open_.values() and rng.random() < 0.2:
                open_[_ask(engine, talk, rng)] = talk
        for event in engine.step():
            talk, now = open_[event.id], time.monotonic()
            talk.came_s.append(now)
            talk.tokens += event.tokens
            if event.usage:
                first.append(talk.came_s[0] - talk.asked_s)
                between += [b - a for a, b in zip(talk.came_s, talk.came_s[1:], strict=False)]
                talk.tokens += [rng.randrange(1000, 9000) for _ in range(ASKED)]
                del open_[event.id]
    seconds = time.monotonic() - begun
    engine.check_integrity()
    stats = engine.stats()
    return {
        "seconds": seconds,
        "stall_ms": 1e3 * sum(watch.stalls_s),
        "worst_stall_ms": 1e3 * max(watch.stalls_s),
        "first_p99_ms": 1e3 * high(first),
        "between_p50_ms": 1e3 * median(between),
        "between_p99_ms": 1e3 * high(between),
        "evicted": watch.evicted,
        **{name: stats[name] for name in ("tokens", "preemptions", "moved_out", "moved_in", "copies", "steps")},
        "block_bytes": stats["block_bytes"],
    }


class Watch:
    """Times what the engine spends between two passes of the model on choosing and moving, and counts evictions."""

    def __init__(self, engine: Engine) -> None:
        self.stalls_s: list[float] = []
        self.evicted = 0
        choose, keep = engine.scheduler.next, engine.shelf.keep

        def timed() -> Any:
            begun = time.monotonic()
            turn = choose()
            self.stalls_s.append(time.monotonic() - begun)
            return turn

        def counted(digest: bytes, block: int) -> None:
            self.evicted += 1
            keep(digest, block)

        engine.scheduler.next, engine.shelf.keep = timed, counted


def _ask(engine: Engine, talk: Talk, rng: random.Random) -> int:
    talk.turns -= 1
    talk.asked_s, talk.came_s = time.monotonic(), []
    return engine.submit(Request(prompt=tuple(talk.tokens), max_tokens=SAID, priority=rng.randrange(4)))


def high(values: list[float]) -> float:
    """The 99th percentile."""
    ranked = sorted(values)
    return ranked[min(int(0.99 * len(ranked)), len(ranked) - 1)]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
