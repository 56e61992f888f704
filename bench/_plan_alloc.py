"""One LoRA step of SmolLM2 under one allocator, in a process of its own, for bench/plan.

python -m bench._plan_alloc '"pool"'     the page pool that satchel installs
python -m bench._plan_alloc '"glibc"'    the C library as it is
python -m bench._plan_alloc '"mmap"'     the C library, every block from 128 KiB on mapped by itself
"""

import ctypes
import json
import sys
import time

import torch

from bench._harness import median
from satchel.core.job import TuneJob
from satchel.model.batch import Batch
from satchel.model.load import load
from satchel.run.assemble import assemble
from satchel.run.memory import install_pool, peak_resident_bytes, reset_peak_resident, resident_bytes
from satchel.run.rehearse import DTYPES
from satchel.run.step import train_step

M_MMAP_THRESHOLD, THRESHOLD = -3, 128 << 10  # of mallopt(3)
STEPS = 4
JOB = TuneJob(model="demo", data="demo", batch=4, context=256)


def main(allocator: str) -> None:
    """Print resident and tensor bytes, CPU and wall seconds of a step after the first, as JSON."""
    pool = install_pool() if allocator == "pool" else None
    if allocator == "mmap":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    before = resident_bytes()
    reset_peak_resident()
    assembly = assemble(JOB, load("demo", DTYPES[JOB.dtype]))
    batch = _batch(torch.Generator().manual_seed(0))
    wall, cpu = [], []
    for _ in range(STEPS):
        start = time.perf_counter(), time.process_time()
        train_step(assembly, [batch], assembly.lr)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    found = {"resident": peak_resident_bytes() - before, "cpu_s": median(cpu[1:]), "wall_s": median(wall[1:])}
    print(json.dumps(found | {"tensors": pool.peak_bytes if pool else None}))


def _batch(rng: torch.Generator) -> Batch:
    tokens_1N = torch.randint(0, 49152, (1, JOB.batch * JOB.context), generator=rng)
    return Batch(tokens_1N, tokens_1N.roll(-1), (JOB.context,) * JOB.batch, tokens_1N.numel())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
