"""The bench of checkpoints measures every way to save in the trainer's own loop, on the same disk."""

import os
import time
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bench import _checkpoint_run, checkpoint
from bench._checkpoint_run import PEER, Dcp, SlowDisk
from docs.headlines import headline
from satchel.core import book
from satchel.model import disk
from satchel.run.checkpoint import KEPT


def test_every_way_of_the_book_is_measured_beside_the_peer():
    assert set(checkpoint.ways()) == {e.name for e in book.entries() if e.slot == "checkpoint"} | {PEER}
    assert checkpoint.BASE in checkpoint.ways()


@pytest.mark.parametrize("cached", [False, True])
def test_a_slow_disk_takes_its_time_for_every_byte_once(tmp_path, cached, monkeypatch):
    slow, size = SlowDisk(bytes_per_s=20 << 20), (4 << 20) + 3
    monkeypatch.setattr(os, "write", slow.write)
    monkeypatch.setattr(os, "fsync", slow.fsync)
    if cached:
        monkeypatch.setattr(disk, "UNCACHED", 0)
    take, taken = slow._take, []
    monkeypatch.setattr(slow, "_take", lambda handle, count, began: (taken.append(count), take(handle, count, began)))
    began = time.perf_counter()
    disk.write_pieces(tmp_path / "file", [bytes(size)])
    disk.sync(tmp_path)
    assert time.perf_counter() - began >= size / (20 << 20) and sum(taken) == size


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_peer_saves_what_we_do_and_keeps_as_many(tmp_path):
    saver, tensors = Dcp(tmp_path), {"a": torch.randn(5, 3)}
    for _ in range(KEPT + 2):
        tensors["a"] += 1
        saver.save({"x": tensors}, print)
    saver.finish()
    read = {"x.a": torch.zeros(5, 3)}
    dcp.load(read, checkpoint_id=max(tmp_path.iterdir()), no_dist=True)
    assert torch.equal(read["x.a"], tensors["a"]) and KEPT <= len(list(tmp_path.iterdir())) <= KEPT + 1


def test_a_row_says_what_is_lost_and_a_failure_is_a_row_too(tmp_path):
    bench = checkpoint.Bench(tmp_path, Namespace(every=10, slow=250))
    base, ours, failed = (checkpoint.Case("all weights", "slow", way) for way in checkpoint.ways())
    run = {"plain_s": 2.0, "wait_s": 0.5, "checkpoint_bytes": 1 << 20, "tensor_peak_bytes": 1 << 30}
    bench.found[base] = [run | {"often_s": 4.0, "every_s": 2.2}]
    bench.found[ours] = [run | {"often_s": 2.5, "every_s": 2.1}]
    bench.found[failed] = [{"error": "no disk"}]
    line = checkpoint.row(bench, ours)
    assert (line["lost, every step"], line["lost, every 10 steps"], line["disk"]) == ("25.0%", "5.0%", "250 MiB/s")
    assert line["of the blocking one's"] == 0.25 and checkpoint.row(bench, failed)["lost, every step"] == "no disk"
    table = [checkpoint.row(bench, case) for case in (base, ours, failed)]
    table[1]["of it waiting, s"] = 0.1
    said = "a lazy checkpoint over a blocking one, all weights: waits 0.2x to 0.2x, costs 0.25x to 0.25x"
    assert headline("checkpoint", table) == said
    assert "not measured" in headline("checkpoint", table[1:])  # where the blocking one failed


@pytest.mark.slow
@pytest.mark.parametrize("way", checkpoint.ways())
def test_a_run_is_measured(tmp_path, way):
    checkpoint.prepare(tmp_path, quick=True)
    found = _checkpoint_run.main(str(tmp_path), str(tmp_path / "out"), way, 0, 2, 1, adapter="none", lr=1e-5)
    assert found["plain_s"] > 0 and found["checkpoint_bytes"] > 40 << 20
