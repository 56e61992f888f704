"""Guessing ahead against plain decoding: `satchel bench speculate`, or `python -m bench.speculate --help`.

SmolLM2-135M, as `satchel serve` has it, answers four prompts of three kinds, greedily and drawn at 0.7, one at a time
and four at once. The small model is made here, since none comes with the package: SmolLM2's first layers,
tuned for some minutes on what SmolLM2 itself says. Each way runs all of it in a process of its own, in rounds. Chains
and trees of as many guesses stand beside each other: `kept` is how many of a draft's are right. Every answer is
compared with plain decoding's, token by token: `same` is the share of the answers that are identical (products differ
in the last bits from 32 rows on, so that a near tie may fall the other way; RSD by rejection draws others).
FFN-SkipLLM, which changes answers, stands beside them. What does not pay is reported too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench._harness import add_work, interleave, median, once, workplace, write

WAYS = {
    "plain": "plain",
    "lookup": "lookup",
    "draft, 4": "draft:model={small},tokens=4",
    "draft, 8": "draft:model={small},tokens=8",
    "SpecDec++": "specdecpp:model={small},threshold=0.5",
    "RSD-C, 8": "rsd:model={small},branches=2+1+1+1",
    "RSD-S, 8": "rsd:model={small},width=2,depth=4",
    "RSD-S, 12": "rsd:model={small},width=3,depth=4",
}
SKIPS = {"FFN-SkipLLM": "ffn_skip", "FFN-SkipLLM, whatever the harm": "ffn_skip:harm=100"}  # change answers
DRAWN = {"RSD-S, 8, own noise": "rsd:model={small},width=2,depth=4,rule=noise"}  # greedily no other way
PROMPTS = ("edit", "question", "reference")
TOKENS = 40  # of an answer
REPETITIONS = 3


def main() -> None:
    """Make the small model, run everything, and write bench/results/speculate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, written nowhere")
    add_work(parser)
    asked = parser.parse_args()
    with workplace(None if asked.quick else asked.work) as home:
        sizes = {"layers": 4, "texts": 16, "steps": 2} if asked.quick else {"layers": 4, "texts": 192, "steps": 200}
        folder = str(home / "small")
        small = once(home, "bench._speculate_draft", sizes, timeout_s=3600, folder=folder)
        print(small, flush=True)
        table = compare(home, folder, asked.quick)
    for row in table:
        print(row)
    if not asked.quick:
        write("speculate", "Guessing ahead: SmolLM2-135M, four prompts of each kind", table, small=small)


def kinds(quick: bool) -> list[dict[str, Any]]:
    """What every way answers."""
    how = {"batch": 1, "temperature": 0.0, "tokens": 12 if quick else TOKENS}
    greedily = [how | {"prompts": kind} for kind in PROMPTS]
    drawn, together = how | {"prompts": "question", "temperature": 0.7}, how | {"prompts": "question", "batch": 4}
    return [greedily[0], drawn] if quick else [*greedily, drawn, together]


def cases(small: str, quick: bool) -> list[dict[str, Any]]:
    """What is run in each round: a process each."""
    every = kinds(quick)
    found = [{"way": way, "decoding": text, "kinds": every} for way, text in WAYS.items()]
    drawn = [kind for kind in every if kind["temperature"]]
    found += [{"way": way, "decoding": text, "kinds": drawn} for way, text in DRAWN.items()]
    asked = [kind for kind in every if kind["prompts"] == "question" and kind["batch"] == 1 and not kind["temperature"]]
    found += [{"way": way, "decoding": "plain", "skip": text, "kinds": asked} for way, text in SKIPS.items() if asked]
    return [case | {"decoding": case["decoding"].format(small=small)} for case in found]


def compare(home: Path, small: str, quick: bool) -> list[dict[str, Any]]:
    """A row for each kind and way, medians over the rounds."""
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    every = cases(small, quick)
    for number, case in enumerate(interleave(every, 1 if quick else REPETITIONS)):
        found = once(home, "bench._speculate_run", case, number=number // len(every))
        for number, kind in enumerate(case["kinds"]):
            one = found["runs"][number] if "runs" in found else found
            print(case["way"], kind["prompts"], {k: v for k, v in one.items() if k != "said"}, flush=True)
            runs.setdefault((kind["prompts"], kind["temperature"], kind["batch"], case["way"]), []).append(one)
    order = [(kind["prompts"], kind["temperature"], kind["batch"]) for kind in kinds(quick)]
    table = sorted(runs.items(), key=lambda pair: order.index(pair[0][:3]))
    return [row(*key, found, runs[*key[:3], "plain"]) for key, found in table]


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
        "kept a draft": round(one["right"] / one["drafts"], 2) if one["drafts"] else "",
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
