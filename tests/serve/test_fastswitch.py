"""Blocks go to the shelf and come back as they were; answers do not change, and less is computed."""

import os
import random
import threading

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Request
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.serve.fastswitch import Fastswitch, _at_once, _OnHost
from tests.run.toys import toy_decoder

BLOCK = (2, 2, 2, 64)
WAYS = ("fastswitch:size=4MiB", "fastswitch:size=4MiB,overlap=false")


def pool(blocks=4, dtype=torch.bfloat16):
    return torch.randn(blocks, *BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)


def on_host(size):
    """What a GPU's pool goes to; here without pinning and streams."""
    return lambda data: _OnHost(data, size, _at_once)


STARTS = {
    "disk": Fastswitch(size="1MiB").start,
    "disk, waiting": Fastswitch(size="1MiB", overlap=False).start,
    "host": on_host(1 << 20),
}
each_place = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)


@each_place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_come_back_bit_for_bit_wherever_they_go(start, dtype):
    data = pool(dtype=dtype)
    shelf, before = start(data), data.clone()
    for block in range(3):
        shelf.keep(bytes([block]), block)
    data.zero_()
    assert shelf.fetch([(b"\1", 3), (b"\0", 1), (b"\7", 0), (b"\2", 2)]).wait() == 2
    assert torch.equal(data[3], before[1]) and torch.equal(data[1], before[0]) and not data[[0, 2]].any()


@each_place
def test_whatever_happens_a_digest_brings_its_own_block(start):
    """At random: blocks are written, foreseen, kept, overwritten and fetched, on a shelf of few places."""
    data, rng, content = pool(12), random.Random(0), {}
    shelf = start(data)
    shelf.count = 6
    holds: dict[int, bytes] = {}
    for number in range(600):
        block, digest = rng.randrange(12), number.to_bytes(2, "big")
        if block in holds:
            shelf.keep(holds.pop(block), block)
        data[block] = number
        content[digest], holds[block] = float(data[block].flatten()[0]), digest
        shelf.foresee([(holds[b], b) for b in rng.sample(sorted(holds), min(len(holds), 3))])
        if number % 7 == 0 and len(holds) > 3:
            targets = sorted(rng.sample(sorted(holds), 3))
            for target in targets:
                shelf.keep(holds.pop(target), target)
            wanted = rng.sample([d for d in content if shelf.has(d)], 3)
            came = shelf.fetch(list(zip(wanted, targets, strict=True))).wait()
            for digest, target in list(zip(wanted, targets, strict=True))[:came]:
                assert bool((data[target] == content[digest]).all())
    assert shelf.moved_out > 300 and shelf.moved_in > 100


def test_blocks_that_follow_each_other_move_by_one_call():
    data = pool(64)
    shelf, before = Fastswitch(size="1MiB").start(data), data.clone()
    chain = [(bytes([block]), block) for block in (*range(40, 60), *range(3, 9))]
    shelf.foresee(chain)
    for digest, block in chain:
        shelf.keep(digest, block)
    assert shelf.moved_out == 26 and shelf.copies == 1
    data.zero_()
    assert shelf.fetch([(digest, 63 - at) for at, (digest, _) in enumerate(chain)]).wait() == 26
    assert shelf.copies == 2 and torch.equal(data[63], before[40]) and torch.equal(data[38], before[8])


def test_only_a_block_whose_copy_is_not_finished_is_waited_for(monkeypatch):
    data, let_go, write = pool(), threading.Event(), os.pwritev
    shelf = Fastswitch(size="1MiB").start(data)
    shelf.foresee([(b"a", 0)])
    shelf.settle(0)
    monkeypatch.setattr("os.pwritev", lambda *call: let_go.wait(20) and write(*call))
    shelf.foresee([(b"b", 1)])
    shelf.keep(b"a", 0)
    shelf.settle(3)
    assert shelf.moved_out == 1
    threading.Timer(0.05, let_go.set).start()
    shelf.keep(b"b", 1)
    assert shelf.moved_out == 2 and let_go.is_set()


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

    monkeypatch.setattr("os.pwritev", full)
    shelf.foresee([(b"b", 1), (b"c", 2)])
    assert shelf.fetch([(b"b", 3)]).wait() == 0, "what was not written does not come back"
    assert not shelf.has(b"b") and not shelf.has(b"c") and shelf.has(b"a") and shelf.count == 1
    monkeypatch.undo()
    shelf.keep(b"c", 2)
    assert shelf.fetch([(b"c", 3)]).wait() == 1 and torch.equal(data[3], data[2])


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


@pytest.mark.parametrize("way", WAYS)
def test_preempted_answers_are_the_same_and_less_is_computed(way):
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(4, 60) for _ in range(rng.randint(20, 60))) for _ in range(10)]
    requests = [Request(prompt=prompt, max_tokens=50) for prompt in prompts]
    roomy, _ = serve("recompute", requests, blocks=80)
    again, computed = serve("recompute", requests)
    kept, switched = serve(way, requests)
    assert roomy == again == kept
    assert computed.stats()["preemptions"] > 3 and switched.stats()["moved_in"] > 3
    assert switched.stats()["tokens"] < computed.stats()["tokens"]
    least = sum(len(r.prompt) + r.max_tokens - 1 for r in requests)  # what a pool without end computes
    assert switched.stats()["tokens"] - least < 0.5 * (computed.stats()["tokens"] - least)


@pytest.mark.parametrize("way", WAYS)
def test_a_conversation_moves_only_what_is_new(way):
    """Turns of several conversations push each other out of a small pool; no block is moved out twice."""
    rng, engine = random.Random(5), Engine(toy_decoder(), Limits(12, 2, 64, 192), preemption=way)
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


def test_others_go_on_while_the_blocks_of_one_are_on_their_way(monkeypatch):
    engine = Engine(toy_decoder(), Limits(12, 4, 64, 192), preemption=WAYS[0])
    prompt = tuple(range(4, 60)) * 2
    first = Request(prompt=prompt, max_tokens=2)
    engine.submit(first)
    alone = [t for e in engine.run() for t in e.tokens]
    engine.submit(Request(prompt=(9,) * 100, max_tokens=60))  # pushes it out
    engine.run()
    let_go, read = threading.Event(), os.preadv
    monkeypatch.setattr("os.preadv", lambda *call: let_go.wait(20) and read(*call))
    other = engine.submit(Request(prompt=(7, 8), max_tokens=20))
    engine.step()
    again = engine.submit(first)
    events = [event for _ in range(5) for event in engine.step()]
    assert {event.id for event in events} == {other} and len(events) == 5
    engine.check_integrity()
    let_go.set()
    events = engine.run()
    assert [t for e in events if e.id == again for t in e.tokens] == alone
    assert engine.stats()["moved_in"] > 3 and engine.stats()["blocks_held"] == 0


def test_who_is_cancelled_while_its_blocks_are_on_their_way_leaves_nothing_behind(monkeypatch):
    engine = Engine(toy_decoder(), Limits(12, 4, 64, 192), preemption=WAYS[0])
    first = Request(prompt=tuple(range(4, 60)) * 2, max_tokens=2)
    for request in (first, Request(prompt=(9,) * 100, max_tokens=60)):
        engine.submit(request)
        engine.run()
    let_go, read = threading.Event(), os.preadv
    monkeypatch.setattr("os.preadv", lambda *call: let_go.wait(20) and read(*call))
    engine.submit(Request(prompt=(7, 8), max_tokens=20))
    engine.step()
    id = engine.submit(first)
    engine.step()
    threading.Timer(0.05, let_go.set).start()
    assert [event.finish for event in engine.cancel(id)] == ["cancelled"]
    engine.check_integrity()
    engine.run()
    engine.check_integrity()
