"""Real runs of jobs that are rehearsed elsewhere, in one process of their own whose torch allocates from the page pool.

The first test that asks starts it, `python -m tests.run.real`, and it serves all others until its input ends: a line
with [[HF configuration, job's fields, lengths of the documents], ...] comes in, a line with their peaks goes out.
"""

import gc
import json
import select
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from bench._plan_run import run
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.native.build import compiler
from satchel.run.memory import install_pool

STEPS = 2  # the first makes the optimizer's state, the second lives with it
PATIENCE_S = 300
needs_pool = pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="needs Linux and a C++ compiler")


def real_peaks(cases: list[tuple[dict, TuneJob, tuple[int, ...]]]) -> list[dict[str, int]]:
    """For each (HF configuration, job, lengths): phase to the most bytes of tensors that were alive in it."""
    process = worker()
    process.stdin.write(json.dumps([[hf, job.to_dict(), lengths] for hf, job, lengths in cases]) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
    answer = process.stdout.readline() if ready else ""
    if not answer:
        process.kill()
        worker.cache_clear()
        raise AssertionError("a real run failed, as the standard error says, or has not ended")
    return json.loads(answer)


@cache
def worker() -> subprocess.Popen:
    """The process, which ends when this one does."""
    command = [sys.executable, "-m", "tests.run.real"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)


def main() -> None:
    """Serve."""
    answers, sys.stdout = sys.stdout, sys.stderr
    pool = install_pool()
    torch.set_num_threads(1)
    for line in sys.stdin:
        found = []
        for hf, fields, lengths in json.loads(line):
            gc.collect()
            idle = pool.live_bytes  # of the runs before: nothing but what is kept for good
            peaks = run(TuneJob(**fields), ModelConfig.from_hf(hf), tuple(lengths), pool, STEPS)["peaks"]
            found.append({phase: peak - idle for phase, peak in peaks.items()})
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
