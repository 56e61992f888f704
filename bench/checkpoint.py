"""What a checkpoint costs the loop: `satchel bench checkpoint`, or `python -m bench.checkpoint --help`.

SmolLM2-135M in bf16, 4 rows of 256 tokens a step, all weights by AdamW and a LoRA of rank 8; a checkpoint is what
trains and the optimizer's moments. Every way to save runs in the trainer's own loop, in a process of its own; the peer
is torch's, which copies everything before it returns and writes it in the background. What is lost is the time between
the ends of two steps, less that of steps without a checkpoint in the same process; waiting is the part of it within the
saver's calls. The slow disk is a limit on what this process writes: past the system's cache os.write returns when such
a disk has the bytes, through the cache os.fsync does. All of it is time: it needs a quiet machine. With --work a bench
that was stopped goes on from the runs that are there.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from bench import tune
from bench._checkpoint_run import PEER
from bench._harness import add_work, interleave, once, told, workplace, write
from bench._toy import toy
from bench._tune_loop import BATCH, CONTEXT
from satchel.core import book

PATIENCE_S = 1800
MIB = 1 << 20
BASE = "blocking"
JOBS = {
    "all weights": {"adapter": "none", "lr": 1e-5},
    "LoRA r=8": {"adapter": "lora:rank=8", "lr": 1e-4},
}
DISKS = ("as it is", "slow")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    job: str
    disk: str
    way: str


@dataclass(frozen=True)
class Bench:
    """The measurements of one call."""

    work: Path
    asked: argparse.Namespace
    found: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, case: Case) -> None:
        """Measure a case once more, in a process of its own."""
        disk, before = self.asked.slow * MIB if case.disk == "slow" else 0, self.found.setdefault(case, [])
        argument = {"way": case.way, "disk_bytes_per_s": disk, "every": self.asked.every, "often": self.asked.often}
        with tempfile.TemporaryDirectory(dir=self.work) as out:
            places = {"work": str(self.work), "out": out}
            argument |= JOBS[case.job]
            result = once(self.work, "bench._checkpoint_run", argument, PATIENCE_S, len(before), **places)
        before.append(result)
        print(f"{case.job}, disk {case.disk}, {case.way}: {said(result)}", flush=True)

    def mean(self, case: Case) -> dict[str, float]:
        """The means over the runs of a case that did not fail; empty if there is none."""
        whole = [run for run in self.found.get(case, []) if "error" not in run]
        numbers = [name for name, value in whole[0].items() if not isinstance(value, str)] if whole else []
        return {name: mean(run[name] for run in whole) for name in numbers}


def said(result: dict[str, Any]) -> str:
    """A run in some words."""
    if "error" in result:
        return result["error"]
    return f"step {result['plain_s']:.2f} s, saved each {result['often_s']:.2f} s, waits {result['wait_s']:.2f} s"


def ways() -> list[str]:
    """All methods of the slot, and the peer."""
    return [entry.name for entry in book.entries() if entry.slot == "checkpoint"] + [PEER]


def lost(run: dict[str, float], kind: str) -> float:
    """Seconds a step that are lost to checkpoints."""
    return run[f"{kind}_s"] - run["plain_s"]


def row(bench: Bench, case: Case) -> dict[str, Any]:
    """One line of the table."""
    run, base = bench.mean(case), bench.mean(Case(case.job, case.disk, BASE))
    disk = f"{bench.asked.slow} MiB/s" if case.disk == "slow" else case.disk
    cells: dict[str, Any] = {"job": case.job, "disk": disk, "way": case.way}
    if not run:
        return cells | {"lost, every step": bench.found[case][0]["error"]}
    often, every = lost(run, "often"), lost(run, "every")
    return cells | {
        "checkpoint, MiB": round(run["checkpoint_bytes"] / MIB),
        "step, s": round(run["plain_s"], 2),
        "lost, every step": f"{often / run['plain_s']:.1%}",
        f"lost, every {bench.asked.every} steps": f"{every / run['plain_s']:.1%}",
        "lost a checkpoint, s": round(often, 3),
        "of the blocking one's": round(often / lost(base, "often"), 3) if base else "",
        "of it waiting, s": round(run["wait_s"], 3),
        "peak of tensors, MiB": round(run["tensor_peak_bytes"] / MIB),
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--every", type=int, default=10, help="steps between two checkpoints, where not every step saves"
    )
    parser.add_argument("--often", type=int, default=7, help="steps that are timed while each is saved")
    parser.add_argument("--slow", type=int, default=250, help="of the slow disk, MiB/s")
    parser.add_argument("--repetitions", type=int, default=1, help="processes a row")
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps: a test of the bench")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/checkpoint.json; what was measured before an interruption is kept."""
    asked = arguments(given)
    if asked.quick:
        asked.every, asked.often = 3, 2
    cases = [Case(job, disk, way) for job in JOBS if asked.only in job for disk in DISKS for way in ways()]
    with workplace(None if asked.quick else asked.work) as work:
        bench = Bench(work, asked)
        prepare(bench.work, asked.quick)
        try:
            for case in interleave(cases, asked.repetitions):
                bench.run(case)
        finally:
            path = report(bench, cases)
    return path


def prepare(work: Path, quick: bool) -> None:
    """Write the model and the tokens, once."""
    if (work / "tokens.npz").exists():
        return
    if quick:
        toy(work / "random", width=192, layers=1)
    tune.prepare(work, steps=1, **({"model": str(work / "random"), "tokenizer": "demo"} if quick else {}))


def report(bench: Bench, cases: list[Case]) -> Path:
    """Write what was found."""
    table = [row(bench, case) for case in cases if case in bench.found]
    title = f"Step time lost to checkpoints, SmolLM2-135M, {BATCH} x {CONTEXT} tokens a step"
    runs = [vars(case) | run for case, found in bench.found.items() for run in found]
    return write("checkpoint", title, table, arguments=told(bench.asked), runs=runs)


if __name__ == "__main__":
    main()
