"""What making room in the pool costs: `satchel bench switch`, or `python -m bench.switch --help`.

SmolLM2-135M, 18 conversations of three turns through a pool that holds five of them; every turn draws
another priority, so that answers push each other out in the middle. What was pushed out is computed again, or comes
back from disk: the engine waits for each copy, or copies while it computes (FastSwitch). A stall is the time between
two passes of the model that goes into choosing and moving. When a turn is asked depends on the steps alone.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench._harness import interleave, measure, median, write

WAYS = {
    "computed again": "recompute",
    "from disk, waiting": "fastswitch:size=1GiB,overlap=false",
    "from disk, beside the steps": "fastswitch:size=1GiB",
}
CASE = {"model": "demo", "blocks": 96, "talks": 18, "turns": 3}


def main(given: list[str] | None = None) -> None:
    """Measure, and write bench/results/switch.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few conversations, written nowhere")
    asked = parser.parse_args(given)
    case = CASE | ({"talks": 6, "turns": 2, "blocks": 56} if asked.quick else {})
    runs = []
    for way in interleave(WAYS, 1 if asked.quick else asked.repetitions):
        found = {"way": way} | measure("bench._switch_run", case | {"preemption": WAYS[way]})
        print(found, flush=True)
        runs.append(found)
    table = [row(way, [run for run in runs if run["way"] == way and "error" not in run]) for way in WAYS]
    print(*table, sep="\n")
    if not asked.quick:
        write("switch", "Making room: 18 conversations in a pool for five, SmolLM2-135M", table, runs=runs)


def row(way: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one way."""
    if not runs:
        return {"way": way, "s": "failed"}
    middle = {name: median(run[name] for run in runs) for name in runs[0] if name != "way"}
    moved = middle["moved_out"] + middle["moved_in"]
    return {
        "way": way,
        "s": round(middle["seconds"], 1),
        "tokens computed": middle["tokens"],
        "preempted": middle["preemptions"],
        "stalls, ms in all": round(middle["stall_ms"]),
        "worst stall, ms": round(middle["worst_stall_ms"], 1),
        "p99 to the first token, ms": round(middle["first_p99_ms"]),
        "p99 between tokens, ms": round(middle["between_p99_ms"]),
        "blocks pushed out": middle["evicted"],
        "written": middle["moved_out"],
        "fetched": middle["moved_in"],
        "blocks a copy": round(moved / middle["copies"], 1) if middle["copies"] else "",
    }


if __name__ == "__main__":
    main()
