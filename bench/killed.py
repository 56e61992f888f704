"""kill -9 at any moment, and what it leaves: `satchel bench killed`, or `python -m bench.killed --help`.

A model of a million parameters trains for 30 steps and saves after every one, in a child process that is killed at a
random moment, resumed, and killed again, until a run ends; then the next run begins. After every kill `latest` has to
name a checkpoint whose checksums match; at the end of every run its checkpoint and all losses have to be, bit for bit,
those of a run that was never killed. With --work a bench that was stopped goes on from the jobs that are done.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench._harness import RESULTS, add_work, once, told, workplace, write
from bench._toy import toy

RUN = "bench._killed_run"
PATIENCE_S = 3600
VOCABULARY = 512
ASIDE = {"checkpoint": "datastates:ring_mib=1"}  # a fifth of a checkpoint, so that the ring goes round
JOBS = {
    "datastates, AdamW": ASIDE,
    "datastates, AdamW in 8 bits": ASIDE | {"optimizer": "adamw8bit"},
    "datastates, LOMO: updates within the backward pass": ASIDE | {"optimizer": "lomo:scale=20"},
    "blocking, AdamW": {"checkpoint": "blocking"},
}


def job(name: str) -> dict[str, Any]:
    """A job's fields, but for its model."""
    plain = {"data": "demo", "adapter": "none", "eval_share": 0.0, "context": 64, "lr": 1e-3}
    return plain | {"batch": 4, "micro_batch": 2, "steps": 30, "save_every": 1} | JOBS[name]


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "run": name,
        "kills": found["kills"],
        "while a checkpoint was half written": found["while_saving"],
        "kills that left a whole checkpoint": found["whole"],
        "runs that ended": found["runs"],
        "bit for bit as one that was not killed": found["identical"],
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=34, help="of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Run, and write bench/results/killed.json after every job."""
    asked, table, runs = arguments(given), [], {}
    path = RESULTS / "killed.json"
    with workplace(asked.work) as work:
        if not (work / "model" / "config.json").exists():
            toy(work / "model", width=192, layers=2, vocabulary=VOCABULARY)
        for name in JOBS:
            argument = {"job": job(name), "vocabulary": VOCABULARY, "kills": asked.kills, "seed": asked.seed}
            with tempfile.TemporaryDirectory(dir=work) as out:
                runs[name] = once(work, RUN, argument, PATIENCE_S, out=out, model=str(work / "model"))
            if "error" in runs[name]:
                raise SystemExit(runs[name]["error"])
            table.append(row(name, runs[name]))
            title = f"kill -9 at {sum(line['kills'] for line in table)} random moments"
            path = write("killed", title, table, arguments=told(asked), runs=runs)
    return path


if __name__ == "__main__":
    main()
