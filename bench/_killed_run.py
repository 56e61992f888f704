"""The runs of bench/killed, in a process of their own: `python -m bench._killed_run JSON` prints one line of JSON.

Children are forked before any thread has started, so that torch is imported only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._tune_satchel import rows
from satchel.core.job import TuneJob
from satchel.model.load import load
from satchel.run.assemble import DTYPES, assemble
from satchel.run.checkpoint import LATEST, damage
from satchel.run.data import Dataset
from satchel.run.metrics import read_metrics
from satchel.run.trainer import train

SLOW_IMPORTS = ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure")  # done once, before the forks
FILES = ("parameters", "optimizer")


@dataclass
class Tally:
    """What happened to the runs of one job."""

    kills: int = 0
    while_saving: int = 0  # of the kills: a half-written checkpoint was left
    whole: int = 0  # of the kills: `latest` named a checkpoint whose checksums matched
    runs: int = 0  # that were killed, resumed and killed again until they ended
    identical: int = 0  # of the runs: checkpoint and losses of one that was never killed
    faults: list[str] = field(default_factory=list)


class Child:
    """A run in a process of its own."""

    def __init__(self, job: TuneJob, tokens_MC: np.ndarray) -> None:
        self.status: int | None = None  # once it has ended
        self.process = os.fork()
        if self.process == 0:
            self._train(job, tokens_MC)

    def _train(self, job: TuneJob, tokens_MC: np.ndarray) -> None:
        try:
            torch.set_num_threads(1)
            dataset = Dataset(rows(tokens_MC), rows(tokens_MC[:0]), kind="text")
            train(job, assemble(job, load(job.model, DTYPES[job.dtype])), dataset)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def wait(self, seconds: float = math.inf, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it has ended, or the time is over, or `until` holds; whether it has ended."""
        over = time.perf_counter() + seconds
        while self.status is None and time.perf_counter() < over and not until():
            ended, status = os.waitpid(self.process, os.WNOHANG)
            self.status = status if ended else None
            time.sleep(0.001)
        return self.status is not None

    def kill(self) -> None:
        """As `kill -9` does."""
        os.kill(self.process, signal.SIGKILL)
        self.wait()


def outcome(out: Path) -> dict[str, Any]:
    """Hashes of the last checkpoint's tensors, its step, and the loss of every step."""
    folder = out / "checkpoints" / (out / "checkpoints" / LATEST).read_text()
    hashes: dict[str, Any] = {
        file: hashlib.sha256((folder / f"{file}.safetensors").read_bytes()).hexdigest() for file in FILES
    }
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    return hashes | {"step": folder.name, "losses": losses}


def kill_and_resume(
    job: TuneJob, tokens_MC: np.ndarray, tally: Tally, chance: random.Random, step_s: float, most: int
) -> None:
    """One run to its end; up to `most` kills on the way, each at any moment of one of the next steps."""
    out = Path(job.out)
    checkpoints, latest = out / "checkpoints", out / "checkpoints" / LATEST
    for kills in itertools.count():
        child = Child(job.replace(resume=latest.exists()), tokens_MC)
        child.wait(until=latest.exists)  # before its first checkpoint a run starts anew
        step = finished(out) + chance.randint(0, job.steps // 3) if kills < most else math.inf
        child.wait(until=lambda step=step: finished(out) >= step)
        if child.wait(chance.random() * step_s):
            tally.faults += ["a resumed run failed"] * bool(child.status)
            return
        child.kill()
        note(tally, checkpoints)


def finished(out: Path) -> int:
    """Steps that a run has finished so far."""
    return len(read_metrics(out / "metrics.jsonl"))


def note(tally: Tally, checkpoints: Path) -> None:
    """What a kill left behind."""
    tally.kills += 1
    tally.while_saving += any(checkpoints.glob(".*.part"))
    latest = checkpoints / (checkpoints / LATEST).read_text()
    fault = damage(latest)
    tally.whole += fault is None
    if fault:
        tally.faults.append(f"{latest.name}: {fault}")


def main(out: str, model: str, job: dict[str, Any], kills: int, vocabulary: int, seed: int) -> dict[str, Any]:
    """The job undisturbed, then killed `kills` times in all, in as many runs as that takes."""
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    whole = TuneJob.from_dict(job | {"model": model, "out": f"{out}/whole"})
    tokens_MC = np.random.default_rng(seed).integers(0, vocabulary, (64, whole.context + 1), np.int32)
    began, first = time.perf_counter(), Child(whole, tokens_MC)
    assert first.wait() and first.status == 0, "the undisturbed run failed"
    step_s, want = (time.perf_counter() - began) / whole.steps, outcome(Path(whole.out))
    tally, chance = Tally(), random.Random(f"{seed}/{json.dumps(job, sort_keys=True)}")
    while tally.kills < kills and not tally.faults:
        again = whole.replace(out=f"{out}/{tally.runs}")
        kill_and_resume(again, tokens_MC, tally, chance, step_s, kills - tally.kills)
        tally.runs += 1
        tally.identical += outcome(Path(again.out)) == want
    return vars(tally) | {"step_s": step_s, "steps": len(want["losses"])}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
