"""What every bench shares: a measurement is a process of its own, results are one JSON file that says whence."""

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from satchel.run.device import device

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; for all that is measured, peers too


def measure(
    module: str,
    argument: Any,
    timeout_s: float = 900,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `python -m module JSON` and parse the last line that it prints; a failure is a result too (`error`).

    A peer may have a `python` and an `environment` of its own.
    """
    command = [python, "-m", module, json.dumps(argument)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return {"error": said[-1] if said else "no output", "exit_code": done.returncode}
    return json.loads(lines[-1])


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The folder that keeps a bench's models and finished runs; a temporary one if none is given."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def add_work(parser: argparse.ArgumentParser) -> None:
    """The option --work."""
    parser.add_argument("--work", type=Path, help="folder that keeps models and finished runs, to go on from there")


def once(
    home: Path,
    module: str,
    argument: dict[str, Any],
    /,
    timeout_s: float = 900,
    number: int = 0,
    how: Mapping[str, Any] | None = None,
    fresh: bool = True,
    **places: Any,
) -> dict[str, Any]:
    """The measurement that an earlier call has kept in `home`; else `measure` it, and keep it with its commit.

    Two measurements are the same if module, argument and number are. `places` are arguments that do not count, such as
    folders; `how` is what else `measure` is told, a peer's Python. What failed is not kept. Without `fresh` nothing is
    measured. Processes that share a folder do not get in each other's way.
    """
    key = {"module": module, "argument": argument, "number": number}
    kept = home / "runs" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}.json"
    if kept.exists():
        return json.loads(kept.read_text())["result"]
    if not fresh:
        return {"error": "not measured"}
    result = {"commit": commit()} | measure(module, argument | places, timeout_s, **(how or {}))
    if "error" not in result:
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(key | {"result": result}))
        draft.replace(kept)
    return result


def told(asked: argparse.Namespace) -> dict[str, Any]:
    """A command line as results name it: nothing of where this machine keeps its files."""
    plain = {name: value.name if isinstance(value, Path) else value for name, value in vars(asked).items()}
    return {name: value for name, value in plain.items() if name != "work"}


def interleave(cases: Iterable[Any], repetitions: int, seed: int = 0) -> list[Any]:
    """Every case `repetitions` times, in rounds, each round in another order: drift of the machine hits all alike."""
    cases, rng, order = list(cases), random.Random(seed), []
    for _ in range(repetitions):
        order += rng.sample(cases, len(cases))
    return order


def median(values: Iterable[float]) -> float:
    """The middle value."""
    ranked = sorted(values)
    return ranked[len(ranked) // 2]


def write(name: str, title: str, table: list[dict[str, Any]], quiet: bool = False, **rest: Any) -> Path:
    """Write bench/results/NAME.json: `table` goes into docs/RESULTS.md, `rest` (single runs, summaries) beside it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = device("cpu")
    versions = f"torch {machine.torch}, Python {platform.python_version()}"
    found = {
        "title": title,
        "machine": f"{machine.name}, {machine.cores} threads, {versions}",
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")),
        "date": time.strftime("%Y-%m-%d"),
        "table": table,
    }
    path = RESULTS / f"{name}.json"
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(found | rest, indent=1) + "\n")
    draft.replace(path)
    if not quiet:
        print(f"wrote {path.relative_to(ROOT)}")
    return path


def commit() -> str:
    """The commit that is checked out."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
