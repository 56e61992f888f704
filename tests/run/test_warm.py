"""Running a job in miniature: every job can be, and the process has grown afterwards by what the job will need."""

import subprocess
import sys

import pytest
import torch

from satchel.core import book
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.warm import MINIATURE, MOST, VOCAB, Samples, miniature, noise, settle, warm_up
from tests.model.families import CASES, hf_config

JOB = TuneJob(model="toy", data="demo", device="cpu", context=32, batch=1, micro_batch=1, dtype="fp32", lr=1e-4)
CONFIG = ModelConfig.from_hf(MINIATURE)
FULL = Samples([noise(VOCAB, (32,))], [noise(VOCAB, (32,))])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("adapter", [entry.name for entry in book.entries() if entry.slot == "adapter"])
def test_a_job_with_any_adapter_can_be_warmed_up_and_settled(adapter, merge):
    job = JOB.replace(adapter=adapter, merge=merge)
    warm_up(job, CONFIG, "cpu")
    settle(job, CONFIG, "cpu", FULL)


@pytest.mark.parametrize("format", [entry.name for entry in book.entries() if entry.slot == "format"])
def test_an_adapter_trains_over_any_format(format):
    settle(JOB.replace(format=format, dtype="bf16"), CONFIG, "cpu", FULL)


@pytest.mark.parametrize("family", CASES)
def test_one_block_of_every_family_can_be_trained(family):
    config = ModelConfig.from_hf(hf_config(family).to_dict())
    job = JOB.replace(context=config.context, adapter="none")
    warm_up(job, config, "cpu")
    settle(job, config, "cpu", Samples([noise(config.vocab, (config.context,))], []))


def test_a_model_of_small_blocks_keeps_its_widths_and_one_of_large_blocks_is_replaced():
    assert miniature(CONFIG, torch.float32).width == CONFIG.width and miniature(CONFIG, torch.float32).layers == 1
    large = ModelConfig.from_hf(MINIATURE | {"hidden_size": 4096, "intermediate_size": 4096 * 4})
    assert large.parameters > MOST and miniature(large, torch.bfloat16) == CONFIG


GROWN = """
import torch
from satchel.run.memory import install_pool, resident_bytes
pool = install_pool()
from satchel.run.warm import settle, warm_up
from satchel.run.planner import SETTLED
from tests.run.test_warm import CONFIG, JOB, Samples, noise
job, lengths = JOB.replace(dtype="bf16", context=512), (512, 384, 320, 256)
samples = Samples([noise(CONFIG.vocab, (each,)) for each in lengths], [])
outside = lambda: (pool.trim(), resident_bytes() - pool.resident_bytes)[1]
warm_up(job, CONFIG, "cpu")
before = outside()
settle(job, CONFIG, "cpu", samples)
settled = outside()
settle(job, CONFIG, "cpu", samples)
print(settled - before, outside() - settled, SETTLED)
"""


def test_a_process_that_has_settled_grows_no_more():
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, more, most = map(int, done.stdout.split())
    assert grown > most > more
