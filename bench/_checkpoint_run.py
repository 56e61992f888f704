"""One measurement of bench/checkpoint: `python -m bench._checkpoint_run JSON` prints one line of JSON.

The trainer's own loop, watched from outside: a run that saves after half of its steps, then one that saves after every
step. The first half of the first run is what a step takes without a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bench._tune_loop import BATCH, CLIP, CONTEXT, Tokens
from bench._tune_satchel import rows
from satchel.core.job import TuneJob
from satchel.core.report import Report
from satchel.core.seams import Saver, Write
from satchel.model.disk import UNCACHED
from satchel.model.load import load
from satchel.run.assemble import DTYPES, assemble
from satchel.run.checkpoint import KEPT
from satchel.run.data import Dataset
from satchel.run.memory import install_pool
from satchel.run.trainer import train

PEER = "torch DCP, asynchronous"


class Dcp(Saver):
    """torch.distributed.checkpoint.async_save, as its documentation calls it, keeping as many checkpoints as we do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.under_way: Future[Any] | None = None

    def save(self, files: Mapping[str, Mapping[str, Tensor]], write: Write) -> None:
        """Copy all tensors now, and write the copies in the background; `write`, ours, is not called."""
        self.finish()
        self.count += 1
        tensors = {f"{name}.{key}": tensor.detach() for name, some in files.items() for key, tensor in some.items()}
        saved = dcp.async_save(tensors, checkpoint_id=self.folder / str(self.count), no_dist=True)
        assert isinstance(saved, Future)
        old = self.folder / str(self.count - KEPT)
        saved.add_done_callback(lambda _: shutil.rmtree(old, ignore_errors=True))
        self.under_way = saved

    def settle(self) -> None:
        """Its copies are made when `save` returns."""

    def finish(self) -> None:
        """Wait until the last one is written."""
        if self.under_way:
            self.under_way.result()
            self.under_way = None


class SlowDisk:
    """A disk that takes a limited number of bytes a second, of whoever writes to it in this process.

    What goes past the system's cache of files waits in os.write; what lies in the cache waits in os.fsync.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at, self.lock = bytes_per_s, 0.0, threading.Lock()
        self.real_write, self.real_fsync = os.write, os.fsync
        self.has: Counter[int] = Counter()  # bytes of a file that are on the disk, by its number

    def write(self, handle: int, data: Any) -> int:
        """What stands in for os.write."""
        began = time.perf_counter()
        count = self.real_write(handle, data)
        if fcntl.fcntl(handle, fcntl.F_GETFL) & UNCACHED:
            self._take(handle, count, began)
        return count

    def fsync(self, handle: int) -> None:
        """What stands in for os.fsync."""
        began, found = time.perf_counter(), os.fstat(handle)
        self.real_fsync(handle)
        if stat.S_ISREG(found.st_mode):
            self._take(handle, found.st_size - self.has[found.st_ino], began)
            del self.has[found.st_ino]

    def _take(self, handle: int, count: int, began: float) -> None:
        self.has[os.fstat(handle).st_ino] += count
        with self.lock:
            done = self.free_at = max(began, self.free_at) + count / self.bytes_per_s
        time.sleep(max(0.0, done - time.perf_counter()))


class Clock(Report):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, metrics: dict[str, float]) -> None:
        """Called at the end of every step."""
        self.ends.append(time.perf_counter())


class Waits:
    """The seconds that the loop spends in a saver."""

    def __init__(self, saver: Saver) -> None:
        self.seconds = 0.0
        for name in ("save", "settle"):
            setattr(saver, name, self._timed(getattr(saver, name)))

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*given: Any) -> None:
            began = time.perf_counter()
            call(*given)
            self.seconds += time.perf_counter() - began

        return timed


def main(
    work: str, out: str, way: str, disk_bytes_per_s: float, every: int, often: int, **settings: Any
) -> dict[str, float]:
    """Seconds a step: plain; with a checkpoint in `every` steps; with one a step, `often` times."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    fields = {"context": CONTEXT, "batch": BATCH, "micro_batch": BATCH, "clip": CLIP, "schedule": "constant:warmup=0"}
    job = TuneJob.from_dict({"model": f"{work}/model", "data": "demo", "eval_share": 0.0} | fields | settings)
    pool, tokens = install_pool(), Tokens.read(Path(work) / "tokens.npz")
    dataset = Dataset(rows(tokens.train_MC), rows(tokens.held_out_MC[:0]), kind="text")
    assembly = assemble(
        job.replace(checkpoint="blocking" if way == PEER else way), load(job.model, DTYPES[job.dtype], "cpu")
    )
    if way == PEER:
        assembly.saver = Dcp(Path(out) / "dcp")
    if disk_bytes_per_s:
        disk = SlowDisk(disk_bytes_per_s)
        os.write, os.fsync = disk.write, disk.fsync  # of this process
    train(job.replace(out=f"{out}/warm", steps=2), assembly, dataset)
    waits, first, second = Waits(assembly.saver), Clock(), Clock()
    pool.reset_peak() if pool else None
    train(job.replace(out=f"{out}/every", steps=2 * every, save_every=every), assembly, dataset, first)
    waits.seconds = 0.0
    train(job.replace(out=f"{out}/often", steps=often + 1, save_every=1), assembly, dataset, second)
    plain, one = np.diff(first.ends[:every]), np.diff(first.ends[every - 1 :])
    return {
        "plain_s": float(plain.mean()),
        "plain_spread_s": float(plain.std()),
        "every_s": float(one.mean()),
        "often_s": float(np.diff(second.ends).mean()),
        "wait_s": waits.seconds / (often + 1),
        "checkpoint_bytes": sum(path.stat().st_size for path in newest(Path(out), way).rglob("*")),
        "tensor_peak_bytes": pool.peak_bytes if pool else 0,
    }


def newest(out: Path, way: str) -> Path:
    """The folder of the last checkpoint."""
    folders = (out / "dcp").iterdir() if way == PEER else (out / "often" / "checkpoints").glob("step-*")
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]))


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
