"""Prompts packed into one row against padded ones: `satchel bench prefill`, or `python -m bench.prefill --help`.

SmolLM2-135M, as `satchel serve` has it, reads 32 prompts, of which only the last tokens go through the head, three
times over:

    packed       the engine: one row without padding, cut into steps of 512 tokens, keys and values into pages
    padded       one batch of all prompts, each as long as the longest; no keys and values are kept
    one by one   each prompt by itself

on lengths with a long tail and on equal ones, where packing has nothing to win. Paper: https://arxiv.org/abs/2404.09529
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from bench._harness import interleave, median, write
from bench._served import served_model
from satchel.core.request import Request
from satchel.model.decoder import Decoder
from satchel.model.source import find_source
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits

PROMPTS, REPETITIONS, EQUAL, LONGEST = 32, 5, 96, 768  # tokens of equal prompts; of the longest
Prompts = list[tuple[int, ...]]


def main() -> None:
    """Run everything, and write bench/results/prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few prompts, written nowhere")
    quick = parser.parse_args().quick
    table = compare(served_model(find_source("demo")), 4 if quick else PROMPTS, 1 if quick else REPETITIONS)
    for row in table:
        print(row)
    if not quick:
        write("prefill", "Reading 32 prompts of SmolLM2-135M", table)


def lengths(count: int) -> dict[str, list[int]]:
    """Tokens of the prompts, by kind."""
    rng = random.Random(0)
    tail = [max(8, min(LONGEST, int(12 * rng.paretovariate(0.7)))) for _ in range(count - 1)]
    return {"long tail": [*tail, LONGEST], "equal": [EQUAL] * count}


def compare(model: Decoder, count: int, repetitions: int) -> list[dict[str, Any]]:
    """A row for each kind of lengths and way, medians over the rounds."""
    ways: dict[str, Callable[[Decoder, Prompts], None]] = {"packed": packed, "padded": padded, "one by one": one_by_one}
    found: dict[tuple[str, str], list[float]] = {}
    cases = [(kind, way) for kind in lengths(count) for way in ways]
    for kind, way in (*cases, *interleave(cases, repetitions)):  # the first round makes kernels for its sizes
        prompts = drawn(lengths(count)[kind], seed=len(found.get((kind, way), [])))
        begun = time.perf_counter()
        ways[way](model, prompts)
        found.setdefault((kind, way), []).append(time.perf_counter() - begun)
    return [row(kind, way, lengths(count)[kind], found) for kind, way in cases]


def row(kind: str, way: str, sizes: list[int], found: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """One line of the table."""
    seconds = median(found[kind, way][1:])
    seen = len(sizes) * max(sizes) if way == "padded" else sum(sizes)
    return {
        "lengths": kind,
        "way": way,
        "tokens": sum(sizes),
        "tokens seen": seen,
        "seconds": round(seconds, 3),
        "over padded": round(seconds / median(found[kind, "padded"][1:]), 3),
    }


def drawn(sizes: list[int], seed: int) -> Prompts:
    """Prompts of these lengths; no two begin alike."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(100, 49000) for _ in range(size)) for size in sizes]


def packed(model: Decoder, prompts: Prompts) -> None:
    """Each prompt is answered by one token."""
    blocks = sum(-(-(len(prompt) + 1) // 16) for prompt in prompts)
    engine = Engine(model, Limits(blocks=blocks, batch=len(prompts), step_tokens=512, context=LONGEST + 1))
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, max_tokens=1))
    engine.run()


@torch.inference_mode()
def padded(model: Decoder, prompts: Prompts) -> None:
    """Behind each prompt filler, which no token before it sees."""
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    x_BTD = model.hidden(tokens_BT)
    ends_BD = torch.stack([x_TD[len(prompt) - 1] for x_TD, prompt in zip(x_BTD, prompts, strict=True)])
    model.logits(ends_BD[None]).argmax(-1)


@torch.inference_mode()
def one_by_one(model: Decoder, prompts: Prompts) -> None:
    """A pass for each prompt."""
    for prompt in prompts:
        model.logits(model.hidden(torch.tensor([prompt]))[:, -1:]).argmax(-1)


if __name__ == "__main__":
    main()
