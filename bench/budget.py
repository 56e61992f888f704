"""Random jobs under random memory budgets: `satchel bench budget`, or `python -m bench.budget --help`.

Each is a job of its own process, with evaluation, checkpoints, export and at times a merge, under a budget drawn
around what it is predicted to take. One that is accepted has to finish, and its process may never hold more than the
budget, which is enforced from outside too: by a memory control group where one can be made, and by ending the process.
One that is refused is run again all the same, under that budget and in the way that the planner found to take least: it
has to be stopped, by the governor's limit or from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from bench._harness import ROOT, write
from bench._toy import toy
from satchel.core.job import TuneJob
from satchel.core.units import parse_bytes
from satchel.model.source import find_source
from satchel.run.governor import OVER_BUDGET
from satchel.run.rehearse import rehearse
from satchel.run.rung import GROWTH

SHAPES = {"small": (192, 4, True), "wide": (768, 3, True), "deep": (384, 16, False)}  # width, layers, tied head
METHODS: dict[str, list[dict[str, Any]]] = {
    "adapter": [
        {"adapter": name, "format": format, "merge": merge}
        for name in ("lora", "lora:rank=64,alpha=64", "rslora:rank=16", "dora")
        for format in ("none", "none", "int8", "nf4", "int4")
        for merge in (False, format == "none")
    ],
    "full": [
        {"adapter": "none", "optimizer": optimizer}
        for optimizer in ("adamw", "adamw:rounding=fp32", "adamw8bit", "galore:rank=32,gap=2")
    ],
}
TOKENS = 1024  # of a step, at most
SHARES = (0.6, 1.5)  # a budget's share of the predicted peak
REFUSED = ("refused rightly", "refused wrongly")
PATIENCE_S = 1800
LATE = "no end within"
PLANNING = 1.1  # a process may hold this many times what planning took before, so that it can refuse at all
CGROUPS = (  # (the folder of groups, the file that limits one): version 2, version 1
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


def prepare(work: Path) -> None:
    """Write the models of random weights, and some text."""
    for name, shape in SHAPES.items():
        toy(work / name, *shape)
    write_text(work)


def write_text(work: Path) -> None:
    """Two dozen documents of about 400 tokens, so that evaluating on a tenth of them is no longer than a step."""
    lines = [json.dumps({"text": topics[name][:1600]}) for name in sorted(topics)[:24]]
    (work / "text.jsonl").write_text("\n".join(lines) + "\n")


def draw(work: Path, rng: random.Random, number: int, base_bytes: int) -> TuneJob:
    """A random job; `base_bytes` is what a process holds that has only planned."""
    model = rng.choice((*SHAPES, "demo"))
    context = rng.choice((64, 128, 256, 512))
    job = TuneJob(
        model="demo" if model == "demo" else str(work / model),
        data=str(work / "text.jsonl"),
        out=str(work / f"out{number}"),
        device="cpu",
        eval_share=0.1,
        dtype=rng.choice(("bf16", "bf16", "fp32")),
        activations=rng.choice(("none", "none", "selective", "full")),
        context=context,
        batch=rng.choice([n for n in (1, 2, 4, 8, 16) if n * context <= TOKENS]),
        packing=rng.random() < 0.7,
        steps=2,
        save_every=rng.choice((0, 1)),
        seed=number,
        **rng.choice(METHODS[rng.choice(("adapter", "full"))]),
    )
    tensors = rehearse(job, find_source(job.model).config, device="cpu").peak.peak_bytes
    share = rng.uniform(*SHARES)
    return job.replace(memory=f"{int(share * (base_bytes + GROWTH + tensors))}B")


def attempt(job: TuneJob, limit_bytes: int | None, *options: str) -> dict[str, Any]:
    """Run a job in its own process and judge it; `killed` if it held more than its limit and was ended for it."""
    with caged(limit_bytes) as cage:
        command = [sys.executable, "-m", "bench._budget_run", json.dumps(job.to_dict()), *options]
        if cage:
            command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cage), *command]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        over = watch(child, limit_bytes)
        out, err = child.communicate()
    said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    result = said[-1] if said else {}
    shutil.rmtree(job.out, ignore_errors=True)
    if "outcome" in result:
        return result
    last = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return result | {
        "outcome": "killed" if over or child.returncode == -signal.SIGKILL else "failed",
        "error": over or last,
    }


def watch(child: subprocess.Popen, limit_bytes: int | None, pause_s: float = 0.02) -> str:
    """Wait for a process; end it if it lasts too long, or if its peak passes the limit. Why it was ended."""
    begin = time.monotonic()
    while child.poll() is None:
        peak = _peak(child.pid)
        late = time.monotonic() - begin > PATIENCE_S
        if late or (limit_bytes and peak > limit_bytes):
            child.kill()
            return f"{LATE} {PATIENCE_S} s" if late else f"held {peak} bytes of {limit_bytes}"
        time.sleep(pause_s)
    return ""


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


@contextmanager
def caged(limit_bytes: int | None) -> Iterator[Path | None]:
    """A control group with that limit, empty; None without a limit, or where the system does not let us make one."""
    made = _cage(limit_bytes) if limit_bytes else None
    try:
        yield made
    finally:
        if made:
            _remove(made)


def _remove(cage: Path, patience_s: float = 10) -> None:
    """A group stays busy for a moment after its last process has gone."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return cage.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _cage(limit_bytes: int) -> Path | None:
    for root, name in CGROUPS:
        cage = root / f"satchel-bench-{os.getpid()}-{threading.get_ident()}"
        try:
            cage.mkdir()
        except OSError:
            continue
        try:
            if not (cage / name).exists():
                raise OSError(f"{cage} takes no limit")
            (cage / name).write_text(str(limit_bytes))
            return cage
        except OSError:
            cage.rmdir()
    return None


def judge(job: TuneJob, base_bytes: int) -> dict[str, Any]:
    """Run a job under its budget; one that is refused again, in spite of it."""
    budget = parse_bytes(job.memory)
    limit = max(budget, int(PLANNING * base_bytes))
    result = attempt(job, limit)
    line = {"job": job.to_dict(), "budget_bytes": budget} | result
    if result["outcome"] == "finished":
        verdict = "finished" if result["peak_bytes"] <= budget else "over its budget"
        return line | {"verdict": verdict, "share": result["peak_bytes"] / budget}
    if result["outcome"] != "refused":
        killed = result["outcome"] == "killed"
        return line | {"verdict": "killed" if killed else "failed"}
    forced = attempt(job, limit, "--insist")
    line |= {"forced": forced, "share": result["predicted_bytes"] / budget}
    if forced["outcome"] == "finished":
        return line | {"verdict": "refused wrongly"}
    return line | {"verdict": "refused rightly" if for_memory(forced) else "refused, unknown"}


def for_memory(stopped: dict[str, Any]) -> bool:
    """Whether memory was why a run ended early: the governor's limit, the control group's, or `watch`'s."""
    if stopped["outcome"] == "killed":
        return LATE not in stopped["error"]
    return any(words in stopped["error"] for words in (OVER_BUDGET, "out of memory"))


def base_bytes(work: Path) -> int:
    """What a process holds at its peak that plans and is refused."""
    job = draw(work, random.Random(0), 0, 0).replace(memory="1MiB")
    return attempt(job, None)["planning_peak_bytes"]


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: how the jobs ended, and the worst of each kind."""
    counts = Counter(line["verdict"] for line in lines)
    shares = {name: [line["share"] for line in lines if line["verdict"] == name and "share" in line] for name in counts}
    accepted = sum(count for name, count in counts.items() if not name.startswith("refused"))
    rows = [
        ("jobs", len(lines)),
        ("accepted", accepted),
        ("finished within their budget", counts["finished"]),
        ("over their budget", counts["over its budget"]),
        ("killed", counts["killed"]),
        ("failed after they were accepted", counts["failed"]),
        ("highest peak / budget of an accepted job", _extreme(max, shares, ("finished", "over its budget"))),
        ("refused", len(lines) - accepted),
        ("shown not to fit", counts["refused rightly"]),
        ("would have fitted", counts["refused wrongly"]),
        ("could not be shown", counts["refused, unknown"]),
        ("lowest prediction / budget of a refused job", _extreme(min, shares, REFUSED)),
    ]
    return [{"what": name, "value": value} for name, value in rows]


def _extreme(pick: Any, shares: dict[str, list[float]], names: tuple[str, ...]) -> float | str:
    found = [share for name in names for share in shares.get(name, [])]
    return round(pick(found), 3) if found else "-"


def main(given: list[str] | None = None) -> Path:
    """Draw, run and judge the jobs; write bench/results/budget.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=60, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--workers", type=int, default=2, help="jobs at once; each has its own process and budget")
    asked = parser.parse_args(given)
    rng, lines = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        base = base_bytes(work)
        with caged(1 << 30) as cage:
            enforced = "a control group" if cage else "its peak, read every 20 ms"
        jobs = (draw(work, rng, number, base) for number in range(asked.jobs))
        with ThreadPoolExecutor(asked.workers) as pool:
            for line in pool.map(lambda job: judge(job, base), jobs):
                lines.append(line)
                _tell(line, len(lines), asked.jobs)
    table = summary(lines)
    title = f"{asked.jobs} random jobs under random memory budgets, enforced by {enforced}"
    return write("budget", title, table, arguments=vars(asked), base_bytes=base, runs=lines)


def _tell(line: dict[str, Any], number: int, total: int) -> None:
    what = "prediction" if line["verdict"].startswith("refused") else "peak"
    job, share = line["job"], f", {what} / budget {line['share']:.2f}" if "share" in line else ""
    method = " ".join(str(job[name]) for name in ("adapter", "optimizer", "format", "activations", "dtype"))
    size = f"{Path(job['model']).name} {job['batch']} x {job['context']}"
    print(f"[{number}/{total}] {size} {method}: {line['verdict']}{share} {line.get('error', '')}", flush=True)


if __name__ == "__main__":
    main()
