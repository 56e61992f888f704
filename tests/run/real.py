"""Real runs of jobs that are rehearsed elsewhere, in a process of their own, whose torch allocates from the page pool.

python -m tests.run.real '[[HF configuration, job's fields, lengths of the documents], ...]'
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench._plan_run import run
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.native.build import compiler
from satchel.run.memory import install_pool

STEPS = 2  # the first makes the optimizer's state, the second lives with it
needs_pool = pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="needs Linux and a C++ compiler")


def real_peaks(cases: list[tuple[dict, TuneJob, tuple[int, ...]]]) -> list[dict[str, int]]:
    """For each (HF configuration, job, lengths): phase to the most bytes of tensors that were alive in it."""
    argument = json.dumps([[hf, job.to_dict(), lengths] for hf, job, lengths in cases])
    command = [sys.executable, "-m", "tests.run.real", argument]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main(cases: list) -> None:
    """Print the peaks."""
    pool = install_pool()
    torch.set_num_threads(1)
    found = []
    for hf, fields, lengths in cases:
        gc.collect()
        idle = pool.live_bytes  # of the runs before: nothing but what is kept for good
        peaks = run(TuneJob(**fields), ModelConfig.from_hf(hf), tuple(lengths), pool, STEPS)["peaks"]
        found.append({phase: peak - idle for phase, peak in peaks.items()})
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
