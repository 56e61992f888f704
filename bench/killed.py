"""kill -9 at any moment, and what it leaves: `satchel bench killed`, or `python -m bench.killed --help`.

A model of a million parameters trains for 30 steps and saves after every one, in a child process that is killed at a
random moment, resumed, and killed again, until a run ends; then the next run begins. After every kill `latest` has to
name a checkpoint whose hashes match; at the end of every run its checkpoint and all losses have to be, bit for bit,
those of a run that was never killed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench._harness import measure, write
from bench._toy import toy

PATIENCE_S = 3600
VOCABULARY = 512
ASIDE = {"checkpoint": "datastates:ring_mib=1"}  # a fifth of a checkpoint, so that the ring goes round
JOBS = {
    "datastates, AdamW": ASIDE,
    "datastates, AdamW in 8 bits": ASIDE | {"optimizer": "adamw8bit"},
    "datastates, LOMO: updates within the backward pass": ASIDE | {"optimizer": "lomo:scale=20"},
    "blocking, AdamW": {"checkpoint": "blocking"},
}


def jobs(model: Path) -> dict[str, dict[str, Any]]:
    """The jobs' fields."""
    plain = {"model": str(model), "data": "demo", "adapter": "none", "eval_share": 0.0, "context": 64, "lr": 1e-3}
    sizes = {"batch": 4, "micro_batch": 2, "steps": 30, "save_every": 1}
    return {name: plain | sizes | fields for name, fields in JOBS.items()}


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
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Run, and write bench/results/killed.json."""
    asked = arguments(given)
    with tempfile.TemporaryDirectory() as work:
        toy(Path(work) / "model", width=192, layers=2, vocabulary=VOCABULARY)
        argument = {"work": work, "jobs": jobs(Path(work) / "model"), "vocabulary": VOCABULARY} | vars(asked)
        found = measure("bench._killed_run", argument, PATIENCE_S)
    if "error" in found:
        raise SystemExit(found["error"])
    table = [row(name, told) for name, told in found.items()]
    title = f"kill -9 at {sum(line['kills'] for line in table)} random moments"
    return write("killed", title, table, arguments=vars(asked), runs=found)


if __name__ == "__main__":
    main()
