"""Blocks go to the shelf and come back as they were; answers do not change, and less is computed."""

import random

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Request
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.serve.fastswitch import Fastswitch
from tests.run.toys import toy_decoder

BLOCK = (2, 2, 2, 64)


def pool(blocks=4, dtype=torch.bfloat16):
    return torch.randn(blocks, *BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_comes_back_bit_for_bit_wherever_it_goes(dtype):
    data = pool(dtype=dtype)
    shelf, before = Fastswitch(size="1MiB").start(data), data.clone()
    for block in range(3):
        shelf.keep(bytes([block]), block)
    data.zero_()
    assert shelf.fetch(b"\1", 3) and shelf.fetch(b"\0", 1) and not shelf.fetch(b"\7", 0)
    assert torch.equal(data[3], before[1]) and torch.equal(data[1], before[0]) and not data[[0, 2]].any()


def test_what_is_there_already_is_not_moved_again_and_the_longest_unused_goes_first():
    data = pool()
    shelf = Fastswitch(size=f"{2 * data[0].nbytes}B").start(data)
    shelf.keep(b"a", 0)
    shelf.keep(b"b", 1)
    shelf.keep(b"a", 0)
    assert shelf.moved_out == 2
    shelf.keep(b"c", 2)
    assert shelf.has(b"a") and shelf.has(b"c") and not shelf.has(b"b")


def test_a_full_disk_makes_the_shelf_smaller_and_nothing_else(monkeypatch):
    data = pool()
    shelf = Fastswitch(size="1MiB").start(data)
    shelf.keep(b"a", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    shelf.keep(b"b", 1)
    assert not shelf.has(b"b") and shelf.has(b"a") and shelf.count == 1
    monkeypatch.undo()
    shelf.keep(b"c", 2)
    assert shelf.fetch(b"c", 3) and torch.equal(data[3], data[2])


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no file can be made there"):
        Fastswitch(folder=str(tmp_path / "nowhere")).start(pool())
    with pytest.raises(UserError, match="no memory at all"):
        Fastswitch(size="0B")


def serve(preemption, requests, **limits):
    limits = {"blocks": 12, "batch": 4, "step_tokens": 32, "context": 192} | limits
    engine = Engine(toy_decoder(), Limits(**limits), preemption=preemption)
    ids = [engine.submit(request) for request in requests]
    events = engine.run()
    engine.check_integrity()
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids], engine


def test_preempted_answers_are_the_same_and_less_is_computed():
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(4, 60) for _ in range(rng.randint(20, 60))) for _ in range(10)]
    requests = [Request(prompt=prompt, max_tokens=50) for prompt in prompts]
    roomy, _ = serve("recompute", requests, blocks=80)
    again, computed = serve("recompute", requests)
    kept, switched = serve("fastswitch:size=4MiB", requests)
    assert roomy == again == kept
    assert computed.stats()["preemptions"] > 3 and switched.stats()["moved_in"] > 3
    assert switched.stats()["tokens"] < computed.stats()["tokens"]
    least = sum(len(r.prompt) + r.max_tokens - 1 for r in requests)  # what a pool without end computes
    assert switched.stats()["tokens"] - least < 0.5 * (computed.stats()["tokens"] - least)


def test_a_conversation_moves_only_what_is_new():
    """Turns of several conversations push each other out of a small pool; no block is moved out twice."""
    rng, engine = random.Random(5), Engine(toy_decoder(), Limits(12, 2, 64, 192), preemption="fastswitch:size=4MiB")
    talks = [[rng.randrange(4, 60) for _ in range(30)] for _ in range(4)]
    computed = 0
    for _ in range(3):
        for talk in talks:
            engine.submit(Request(prompt=tuple(talk), max_tokens=10))
            events = engine.run()
            computed += len(talk) - events[-1].usage.cached_tokens
            talk += [t for e in events for t in e.tokens] + [rng.randrange(4, 60) for _ in range(8)]
    engine.check_integrity()
    distinct = sum(len(talk) // 16 for talk in talks)
    assert engine.stats()["moved_out"] <= distinct and engine.stats()["moved_in"] > 0
    assert computed < 0.6 * sum(30 + 48 + 66 for _ in talks)
