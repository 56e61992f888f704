"""A run that was killed again and again ends with the very bits of one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

JOBS = {
    "adapter with dropout": {"adapter": "lora:rank=4,dropout=0.1", "save_every": 1, "checkpoint": "datastates"},
    "all weights in bf16 with stochastic rounding": {"adapter": "none", "dtype": "bf16", "save_every": 2},
    "eight-bit moments": {"adapter": "none", "dtype": "bf16", "optimizer": "adamw8bit", "save_every": 1},
    "saved while updates come within the backward pass": {
        "adapter": "none",
        "optimizer": "lomo:scale=20",
        "checkpoint": "datastates",
        "save_every": 1,
    },
    "projections that are renewed": {"adapter": "none", "optimizer": "galore:rank=4,gap=3", "save_every": 4},
    "all weights in bf16 without gradients": {
        "adapter": "none",
        "dtype": "bf16",
        "optimizer": "mezo:radius=0.01,update=momentum",
        "lr": 1e-4,
        "save_every": 2,
    },
    "micro-batches, evaluations, no packing": {"micro_batch": 2, "eval_every": 3, "packing": False, "save_every": 3},
    "pre-training on a mixture of sources": {"pretrain": True, "dtype": "bf16", "eval_every": 4, "save_every": 2},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    jobs = json.dumps({name: {"steps": 10} | changes for name, changes in JOBS.items()})
    command = [sys.executable, "-m", "tests.run.killed", str(tmp_path_factory.mktemp("killed")), jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", JOBS)
def test_a_run_killed_at_any_step_resumes_bit_for_bit(told, name):
    assert len(told[name]["killed"]) >= 2
    assert told[name]["resumed"] == told[name]["whole"]
    assert len(told[name]["whole"]["losses"]) == 10
