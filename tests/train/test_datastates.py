"""Saving while the next step computes: nothing changes before it is copied, no disk is waited for, errors are told."""

import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from satchel.core.errors import JobError, NoDisk
from satchel.model.safetensors_io import Outgoing, header
from satchel.run import assemble as assembling
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.run.step import train_step
from satchel.train import _ring
from satchel.train.datastates import DataStates, Stager
from tests.run.toys import CharTokenizer, toy_decoder, toy_job

CPU = torch.device("cpu")
SOON, LATE = 0.1, 20.0  # seconds: in which nothing happens that must not; in which what must happen does


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    assert not [thread for thread in threading.enumerate() if "_run" in thread.name]


class Disk:
    """Keeps what is written; waits for `ready` before the first byte."""

    def __init__(self, ready=True):
        self.ready, self.files = threading.Event(), {}
        if ready:
            self.ready.set()

    def write(self, streams):
        assert self.ready.wait(LATE)
        for name, stream in streams.items():
            self.files[name] = b"".join(bytes(piece) for piece in stream)


def named(count=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(7, 5 + i, generator=rng) for i in range(count)}


def read(named, raw):
    return load(header([Outgoing(name, tuple(t.shape), t.dtype, t.detach) for name, t in named.items()]) + raw)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("ring_bytes", [3, 100, 1 << 20])
def test_a_file_is_what_safetensors_reads_whatever_the_rings_size(ring_bytes):
    saver, disk, tensors = Stager(ring_bytes, CPU), Disk(), named() | {"turned": torch.randn(9, 4).bfloat16().T}
    for _ in range(3):
        saver.save({"x": tensors, "y": named(2, 1)}, disk.write)
    saver.finish()
    assert equal(read(tensors, disk.files["x"]), tensors) and equal(read(named(2, 1), disk.files["y"]), named(2, 1))


def test_a_save_returns_at_once_and_settling_does_not_wait_for_the_disk():
    saver, disk, tensors = Stager(1 << 20, CPU), Disk(ready=False), named()
    saver.save({"x": tensors}, disk.write)
    saver.settle()
    for tensor in tensors.values():
        tensor.zero_()
    assert not disk.files
    disk.ready.set()
    saver.finish()
    assert equal(read(tensors, disk.files["x"]), named())


def test_a_full_ring_is_waited_for_before_anything_changes():
    saver, disk = Stager(64, CPU), Disk(ready=False)
    saver.save({"x": named()}, disk.write)
    settled = in_thread(saver.settle)
    settled.join(SOON)
    assert settled.is_alive()
    disk.ready.set()
    settled.join(LATE)
    assert not settled.is_alive()
    saver.finish()


def test_a_second_save_waits_for_the_first():
    saver, disk, order = Stager(1 << 20, CPU), Disk(ready=False), []
    for number in range(2):
        threading.Timer(SOON, disk.ready.set).start()
        saver.save({"x": named()}, lambda streams, number=number: (disk.write(streams), order.append(number)))
    saver.finish()
    assert order == [0, 1]


class Hasty(torch.optim.SGD):
    """Writes before it computes, as a method without gradients does, and says so to nobody."""

    def step(self, closure):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1)
        return super().step(closure)


@pytest.mark.parametrize("optimizer", ["adamw", "lomo:scale=20", "lomo:form=ada", "hasty"])
def test_no_optimizer_can_change_anything_before_it_is_copied(optimizer, tmp_path, monkeypatch):
    if optimizer == "hasty":
        hasty = SimpleNamespace(build=lambda named, lr, seed: Hasty([p for _, p in named], lr=lr))
        make = assembling.make
        monkeypatch.setattr(assembling, "make", lambda slot, name: hasty if name == "hasty" else make(slot, name))
        monkeypatch.setattr("satchel.core.book.check", lambda *_: None)
    job = toy_job(tmp_path, adapter="none", optimizer=optimizer, checkpoint="datastates:ring_mib=1")
    batches = read_dataset(job, CharTokenizer()).train.batches(range(4), 2)
    assembly, disk, copy, held = assemble(job, toy_decoder()), Disk(), _ring._copy, threading.Event()
    train_step(assembly, batches, 0.1)

    def wait_and_copy(to_U, source_U):
        assert held.wait(LATE)
        copy(to_U, source_U)

    monkeypatch.setattr(_ring, "_copy", wait_and_copy)
    tensors = {name: p.detach() for name, p in assembly.parameters}
    before = {name: t.clone() for name, t in tensors.items()}
    assembly.saver.save({"x": tensors}, disk.write)
    step = in_thread(lambda: train_step(assembly, batches, 0.1))
    step.join(5 * SOON)
    assert step.is_alive() and equal(tensors, before)
    held.set()
    step.join(LATE)
    assembly.saver.finish()
    assert equal(read(tensors, disk.files["x"]), before) and not equal(tensors, before)


def test_a_tensor_that_was_written_to_nevertheless_spoils_no_checkpoint():
    saver, disk, tensors = Stager(64, CPU), Disk(ready=False), named()
    saver.save({"x": tensors}, disk.write)
    tensors["t3"].add_(1)
    disk.ready.set()
    with pytest.raises(JobError, match="'t3' was written to while it was being saved.*checkpoint=blocking"):
        saver.finish()
    assert not disk.files


@pytest.mark.parametrize("told", ["settle", "save", "finish"])
def test_what_a_thread_meets_is_told_once_and_the_next_save_works(told):
    saver, disk = Stager(64, CPU), Disk()

    def fail(streams):
        next(iter(streams["x"]))
        raise NoDisk("no disk left")

    saver.save({"x": named()}, fail)
    again = {"settle": saver.settle, "finish": saver.finish, "save": lambda: saver.save({"x": named()}, disk.write)}
    with pytest.raises(NoDisk):
        again[told]()
    saver.settle()
    saver.finish()
    saver.save({"x": named()}, disk.write)
    saver.finish()
    assert equal(read(named(), disk.files["x"]), named())


def test_the_ring_is_there_from_the_start_and_gone_at_the_end():
    saver = DataStates(ring_mib=2).start(CPU)
    assert [tensor.nbytes for tensor in saver.buffers()] == [2 << 20]
    saver.finish()
    assert not saver.buffers()


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux")
def test_its_threads_stand_back_and_the_step_does_not():
    priorities, before = [], os.getpriority(os.PRIO_PROCESS, 0)

    def write(streams):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        list(streams["x"])

    saver = DataStates(nice=7).start(CPU)
    for _ in range(2):
        saver.save({"x": named()}, write)
    saver.finish()
    assert priorities == [min(before + 7, 19)] * 2 and os.getpriority(os.PRIO_PROCESS, 0) == before
