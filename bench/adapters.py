"""Many adapters at once against merging them one by one: `satchel bench adapters`; `python -m bench.adapters --help`.

SmolLM2-135M in bf16, 1,000 LoRA adapters of its query and value maps registered, requests of 64 tokens in and 32 out,
each for another of 32 adapters of ranks 4 to 64, whose answers grow together. Merging serves them one after another,
each with its adapter in the weights, as a server does that knows one model; a merge touches only what the adapter
changes. The logits of the mixed batch are held against PEFT's, which runs each request alone, and against the engine's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import satchel
from bench._adapter_files import adapters
from bench._adapter_files import write as write_adapter
from bench._harness import interleave, measure, median, write
from satchel.model.source import find_source

RANKS = (4, 8, 16, 32, 64)
TARGETS = "q_proj+v_proj"
ADAPTERS, USED, REQUESTS, MERGED = 1000, 32, 96, 24
MEMORY = "1536MiB"
DTYPES = ("bf16", "fp32")
MIB = 1 << 20


def main(given: list[str] | None = None) -> None:
    """Measure, and write bench/results/adapters.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", default=MEMORY)
    parser.add_argument("--quick", action="store_true", help="few adapters and requests, written nowhere")
    asked = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(Path(folder), asked.memory, asked.quick)
        timed = interleave(["mixed", "merged"], 1 if asked.quick else asked.repetitions)
        runs = [run(case | {"way": way}) for way in timed]
        runs += [run(case | {"way": "logits", "dtype": dtype}) for dtype in DTYPES]
    table = rows(runs)
    print(*table, sep="\n")
    if not asked.quick:
        title = f"{ADAPTERS} adapters registered, {USED} of ranks 4 to 64 in one batch, SmolLM2-135M"
        write("adapters", title, table, runs=runs, faster=faster(runs))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    kept = {name: case[name] for name in ("way", "dtype") if name in case}
    found = kept | measure("bench._adapters_run", case)
    print(found, flush=True)
    return found


def prepare(work: Path, memory: str, quick: bool) -> dict[str, Any]:
    """The model as a folder, the adapters that are asked for, and as many of rank 4 as make the number whole."""
    satchel.save(satchel.load("demo"), work / "model", tokenizer_from=find_source("demo"))
    count, used = (40, 8) if quick else (ADAPTERS, USED)
    home = work / "adapters"
    made = adapters(home, "demo", [RANKS[number % len(RANKS)] for number in range(used)], TARGETS)
    spare = write_adapter(satchel.load("demo"), work / "spare", RANKS[0], used, TARGETS)
    for number in range(used, count):
        shutil.copytree(spare, home / f"adapter{number}")
    sizes = {"requests": 16, "merged_requests": 4} if quick else {"requests": REQUESTS, "merged_requests": MERGED}
    names = {"model": "demo", "folder": str(work / "model"), "home": str(home), "used": [path.name for path in made]}
    return names | sizes | {"memory": memory}


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of what was timed; what fills the pool; how far the logits are from PEFT's."""
    speed = {way: [one["tokens"] / one["seconds"] for one in of(runs, way)] for way in ("mixed", "merged")}
    full = max((one["use"] for one in of(runs, "mixed")), key=lambda use: use["share"], default=None)
    far = {one["dtype"]: one for one in of(runs, "logits")}
    table = [
        {"what": "tokens/s, all adapters in one batch", "value": middle(speed["mixed"])},
        {"what": "tokens/s, merged one after another", "value": middle(speed["merged"])},
        {
            "what": "adapters in one step, at most",
            "value": max((one["together"] for one in of(runs, "mixed")), default=""),
        },
    ]
    if full:
        table += [
            {"what": "pool held at its peak", "value": f"{full['share']:.1%}"},
            {"what": "of that filled with numbers, keys and values", "value": f"{full['filled']:.1%}"},
            {
                "what": "the same adapters in slabs of the highest rank",
                "value": f"{full['slabs']:.2f} times the blocks",
            },
        ]
    for dtype, one in far.items():
        table += [
            {"what": f"log-probabilities from PEFT alone, {dtype}, at most", "value": f"{one['from_peft']:.2g}"},
            {"what": f"log-probabilities from the engine alone, {dtype}, at most", "value": f"{one['from_alone']:.2g}"},
        ]
    return table


def of(runs: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """Those of one way that came through."""
    return [one for one in runs if one["way"] == way and "error" not in one]


def middle(values: list[float]) -> Any:
    """The median, rounded."""
    return round(median(values), 1) if values else "failed"


def faster(runs: list[dict[str, Any]]) -> float | None:
    """How many times the throughput of merging."""
    pairs = [
        median(one["tokens"] / one["seconds"] for one in of(runs, way)) for way in ("mixed", "merged") if of(runs, way)
    ]
    return pairs[0] / pairs[1] if len(pairs) == 2 else None


if __name__ == "__main__":
    main()
