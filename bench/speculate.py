"""Guessing ahead against plain decoding: `satchel bench speculate`, or `python -m bench.speculate --help`.

SmolLM2-135M in bf16 answers four prompts of three kinds, greedily and drawn at 0.7, one at a time and four at once.
The small model is made here, since none comes with the package: SmolLM2's first layers, tuned for some minutes on what
SmolLM2 itself says. Each way runs in a process of its own, in rounds. Every answer is compared with plain decoding's,
token by token: `same` is the share of the answers that are identical (bf16 products differ in the last bits with the
number of rows, so that a near tie may fall the other way). FFN-SkipLLM, which changes answers, stands beside them. What
does not pay is reported too.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from bench._harness import interleave, measure, median, write

WAYS = {
    "plain": "plain",
    "lookup": "lookup",
    "draft, 2": "draft:model={small},tokens=2",
    "draft, 4": "draft:model={small},tokens=4",
    "draft, 8": "draft:model={small},tokens=8",
    "SpecDec++": "specdecpp:model={small},threshold=0.5",
}
SKIPS = {"FFN-SkipLLM": "ffn_skip", "FFN-SkipLLM, whatever the harm": "ffn_skip:harm=100"}  # change answers
PROMPTS = ("edit", "question", "reference")
REPETITIONS = 3


def main() -> None:
    """Make the small model, run everything, and write bench/results/speculate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, written nowhere")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as home:
        sizes = {"layers": 4, "texts": 16, "steps": 2} if quick else {"layers": 4, "texts": 256, "steps": 300}
        small = measure("bench._speculate_draft", sizes | {"folder": f"{home}/small"}, timeout_s=3600)
        print(small, flush=True)
        table = compare(f"{home}/small", quick)
    for row in table:
        print(row)
    if not quick:
        write("speculate", "Guessing ahead: SmolLM2-135M, four prompts of each kind", table, small=small)


def cases(small: str, quick: bool) -> list[dict[str, Any]]:
    """What is run in each round."""
    how = {"batch": 1, "temperature": 0.0, "tokens": 12 if quick else 96}
    kinds = [how | {"prompts": kind} for kind in PROMPTS[: 1 if quick else None]]
    if not quick:
        kinds += [how | {"prompts": "question", "temperature": 0.7}, how | {"prompts": "question", "batch": 4}]
    found = [kind | {"way": way, "decoding": text.format(small=small)} for kind in kinds for way, text in WAYS.items()]
    lossy = how | {"prompts": "question", "decoding": "plain"}
    return found + ([] if quick else [lossy | {"way": way, "skip": text} for way, text in SKIPS.items()])


def compare(small: str, quick: bool) -> list[dict[str, Any]]:
    """A row for each way and kind, medians over the rounds."""
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in interleave(cases(small, quick), 1 if quick else REPETITIONS):
        found = measure("bench._speculate_run", case)
        print(case["way"], case["prompts"], {k: v for k, v in found.items() if k != "said"}, flush=True)
        runs.setdefault((case["prompts"], case["temperature"], case["batch"], case["way"]), []).append(found)
    return [row(*key, found, runs[*key[:3], "plain"]) for key, found in runs.items()]


def row(
    prompts: str, temperature: float, batch: int, way: str, found: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> dict[str, Any]:
    """One line of the table."""
    first = {"prompts": prompts, "temperature": temperature, "at once": batch, "way": way}
    if bad := next((run["error"] for run in found + plain if "error" in run), ""):
        return first | {"failed": bad}
    one, base = found[0], plain[0]
    alike = [a == b for a, b in zip(one["said"], base["said"], strict=True)]
    return first | {
        "right, share": round(one["right"] / one["guessed"], 3) if one["guessed"] else "",
        "guesses a draft": round(one["guessed"] / one["drafts"], 2) if one["drafts"] else "",
        "left out": round(one["left_out"], 3) if one["left_out"] else "",
        "tokens a step": round(one["tokens"] / one["steps"], 2),
        "CPU ms a token": round(middle(found, "cpu_ms"), 2),
        "speed, CPU": round(middle(plain, "cpu_ms") / middle(found, "cpu_ms"), 2),
        "speed, wall": round(middle(plain, "wall_ms") / middle(found, "wall_ms"), 2),
        "same": sum(alike) / len(alike),
    }


def middle(runs: list[dict[str, Any]], figure: str) -> float:
    """The median of a figure."""
    return median(run[figure] for run in runs)


if __name__ == "__main__":
    main()
