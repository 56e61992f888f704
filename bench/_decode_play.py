"""What bench/decode asks of every engine: one function that answers prompts, and the figures that come of it.

    answer(prompts, count) -> came      for each prompt the seconds, counted from when all were asked for, at which each
                                        of its `count` tokens came

Imports nothing but the standard library: peers run in environments of their own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Tokens = list[int]
Answer = Callable[[list[Tokens], int], list[list[float]]]

USUAL = {"prefill": [512, 2048], "after": [32, 1024], "together": [8, 16], "first": 128, "count": 64, "times": 3}
SHORT = USUAL | {"prefill": [512], "count": 32, "times": 1}  # of what takes ten times as long a token
BRIEF = {"prefill": [512], "after": [32], "together": [8], "first": 128, "count": 16, "times": 1}  # of the slowest
QUICK = {"prefill": [24], "after": [8], "together": [3], "first": 8, "count": 4, "times": 1}
SHARED_PROMPT = 32  # tokens of each prompt where many answers grow together


def play(start: Callable[[dict[str, Any]], Answer], case: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured of one engine; `load_s` ends with the first token that it ever says."""
    begin = time.perf_counter()
    answer, prompts = start(case), deal(case["vocabulary"])
    answer([next(prompts)[:8]], 1)
    found = {"load_s": time.perf_counter() - begin}
    plan, times = case["plan"], range(case["plan"]["times"])
    for length in plan["prefill"]:
        took_s = middle(answer([next(prompts)[:length]], 1)[0][0] for _ in times)
        found[f"prefill {length}"] = length / took_s
    found["first_s"] = middle(answer([next(prompts)[: plan["first"]]], 1)[0][0] for _ in times)
    for length in plan["after"]:
        found[f"decode {length}"] = middle(rate(answer([next(prompts)[:length]], plan["count"] + 1)) for _ in times)
    found["resident_bytes"] = high_water()
    for batch in plan["together"]:
        asked = [[next(prompts)[:SHARED_PROMPT] for _ in range(batch)] for _ in times]
        found[f"together {batch}"] = middle(rate(answer(some, plan["count"] + 1)) for some in asked)
    return found


def rate(came: list[list[float]]) -> float:
    """Tokens a second of all answers, from when each has its first token."""
    begin = max(times[0] for times in came)
    return sum(at > begin for times in came for at in times) / (max(times[-1] for times in came) - begin)


def context(plan: dict[str, Any]) -> int:
    """Tokens that the longest answer has with its prompt, and those of all answers that grow together, at most."""
    longest = max(*plan["prefill"], *(length + plan["count"] for length in plan["after"])) + 1
    return max(longest, max(plan["together"]) * (SHARED_PROMPT + plan["count"] + 16))


def deal(vocabulary: int) -> Iterator[Tokens]:
    """Prompts without a common beginning, of as many tokens as may be wanted."""
    rng = random.Random(0)
    while True:
        yield [rng.randrange(100, vocabulary) for _ in range(4096)]


def middle(values: Iterable[float]) -> float:
    """The median."""
    ranked = sorted(values)
    return ranked[len(ranked) // 2]


def high_water() -> int:
    """The most bytes that this process ever held."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)
