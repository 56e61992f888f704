"""What an engine takes is known before it runs, and the rest of the memory is its pool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from satchel.core.errors import DoesNotFit, UserError
from satchel.core.serve import ServeJob
from satchel.core.units import parse_bytes
from satchel.model.config import ModelConfig
from satchel.model.paged import PAGE, block_bytes
from satchel.run.capacity import capacity, rehearse_engine
from tests.run.real import needs_pool
from tests.run.served import LLAMA
from tests.tolerances import REHEARSED

CONFIG = ModelConfig.from_hf(LLAMA)


@needs_pool
def test_rehearsed_bytes_are_the_measured_ones():
    command = [sys.executable, "-m", "tests.run.served", "none", "int8", "draft", "rsd", "kv"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for storage, (predicted, measured) in json.loads(done.stdout).items():
        assert measured == pytest.approx(predicted, rel=REHEARSED), storage


def test_the_rest_of_the_memory_becomes_blocks():
    one = block_bytes(CONFIG, torch.bfloat16)
    sizes = [capacity(ServeJob(model="x", memory=memory), CONFIG, "cpu") for memory in ("3GiB", "3.01GiB")]
    assert all(sum(size.accounts.values()) <= size.budget_bytes for size in sizes)
    grown = sizes[1].limits.blocks - sizes[0].limits.blocks
    assert sizes[1].limits.blocks == 32 * 1024 // PAGE or grown == pytest.approx(parse_bytes("0.01GiB") / one, rel=0.5)


def test_no_more_blocks_than_all_answers_can_fill():
    roomy = capacity(ServeJob(model="x", memory="500GiB", batch=3, context=40), CONFIG, "cpu")
    assert roomy.limits.blocks == 3 * 3 and roomy.tokens == 9 * PAGE


def test_a_memory_that_is_too_small_is_refused_with_one_that_would_do():
    with pytest.raises(DoesNotFit, match=r"needs .*iB and the budget is 50.0 MiB") as refusal:
        capacity(ServeJob(model="x", memory="50MiB"), CONFIG, "cpu")
    enough = str(refusal.value).split("needs ")[1].split(" and")[0]
    assert capacity(ServeJob(model="x", memory=enough), CONFIG, "cpu").tokens >= 512


@pytest.mark.parametrize(
    ("has", "told"),
    [({"format": "none"}, ["format=int8", "kv=int8"]), ({"format": "int4"}, ["kv=int8"]), ({"kv": "int8"}, [])],
)
def test_what_would_make_room_is_told_but_for_what_is_done_already(has, told):
    with pytest.raises(DoesNotFit) as refusal:
        capacity(ServeJob(model="x", memory="50MiB", **has), CONFIG, "cpu")
    cures = ("format=int8", "kv=int8", "step_tokens=512", "raise memory")
    assert [cure for cure in cures if cure in str(refusal.value)] == [*told, *cures[2:]]


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(UserError, match="set context=1024"):
        capacity(ServeJob(model="x", context=2000), CONFIG, "cpu")


def test_a_rehearsal_does_not_depend_on_how_deep_the_model_is_beside_its_weights():
    deep = ModelConfig.from_hf(LLAMA | {"num_hidden_layers": 80})
    shallow, tall = (rehearse_engine(ServeJob(model="x"), config, "cpu") for config in (CONFIG, deep))
    assert tall["weights"] > 5 * shallow["weights"]
    assert sum(tall.values()) - tall["weights"] == sum(shallow.values()) - shallow["weights"]
