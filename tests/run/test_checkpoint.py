"""A checkpoint is whole or not there, comes back bit for bit, and a damaged one is never used; so by every saver."""

import contextlib
import errno
import itertools
import json

import pytest
import torch

from satchel.core import book
from satchel.core.errors import JobError, ModelError, NoDisk
from satchel.run import checkpoint
from satchel.run.checkpoint import Checkpoints, pull_tensors, push_tensors
from satchel.run.tracker import Tracker

WAYS = [entry.name for entry in book.entries() if entry.slot == "checkpoint"]


def tensors(seed=0):
    rng = torch.Generator().manual_seed(seed)
    random = torch.randn(7, 5, generator=rng)
    return {
        "fp32": random,
        "bf16": random.bfloat16(),
        "scalar": random[0, 0].clone(),
        "bytes": random.view(torch.uint8).clone(),
        "int16": (random * 100).short(),
        "transposed": random.T,
    }


def save(checkpoints, step, seed=0):
    path = checkpoints.save(step, {"why": "test"}, {"parameters": tensors(seed), "optimizer": {}})
    checkpoints.saver.finish()
    return path


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def notes():
    return []


@pytest.fixture(params=WAYS)
def checkpoints(tmp_path, notes, request):
    saver = book.make("checkpoint", request.param).start(torch.device("cpu"))
    return Checkpoints(tmp_path / "checkpoints", saver, notes.append)


def test_what_was_saved_comes_back_bit_for_bit(checkpoints):
    save(checkpoints, 12)
    saved = checkpoints.newest()
    assert saved.state == {"why": "test", "step": 12} and saved.folder.name == "step-000012"
    assert equal(saved.read("parameters"), tensors()) and saved.read("optimizer") == {}
    parameters = {name: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for name, t in tensors(1).items()}
    saved.read_into("parameters", parameters)
    assert equal(tensors(), parameters)


def test_the_last_two_are_kept_and_latest_names_the_newest(checkpoints):
    for step in (5, 10, 15):
        save(checkpoints, step)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["latest", "step-000010", "step-000015"]
    assert (checkpoints.folder / "latest").read_text() == "step-000015"
    save(checkpoints, 15, seed=3)
    assert equal(checkpoints.newest().read("parameters"), tensors(3))


@pytest.mark.parametrize("file", ["parameters.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used(checkpoints, notes, file, harm):
    save(checkpoints, 1)
    path = save(checkpoints, 2) / file
    content = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if harm == "truncate" else content)
    assert checkpoints.newest().state["step"] == 1
    assert len(notes) == 1 and "step-000002 is damaged" in notes[0]


def test_with_every_checkpoint_damaged_nothing_starts_silently_from_scratch(checkpoints):
    (save(checkpoints, 1) / "state.json").write_text("{}")
    with pytest.raises(JobError, match="no checkpoint is whole"):
        checkpoints.newest()


def test_none_was_saved_yet(checkpoints):
    assert checkpoints.newest() is None


@pytest.mark.parametrize("crash_in", ["write_pieces", "write_text", "sync", "replace_text"])
def test_a_crash_at_any_point_leaves_the_one_before_it_in_force(checkpoints, monkeypatch, crash_in):
    save(checkpoints, 1)

    class Killed(BaseException):
        """Neither caught nor cleaned up after, as kill -9 is."""

    def crash(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, crash_in, crash)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        save(checkpoints, 2, seed=1)
    monkeypatch.undo()
    saved = checkpoints.newest()
    assert saved.state["step"] == 1 and equal(saved.read("parameters"), tensors())
    save(checkpoints, 3)
    assert not list(checkpoints.folder.glob(".*"))


@pytest.mark.parametrize("fails_in", ["write_pieces", "write_text", "sync"])
def test_a_full_disk_leaves_nothing_half_written_and_says_what_is_kept(checkpoints, monkeypatch, fails_in):
    save(checkpoints, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, fails_in, full)
    with pytest.raises(NoDisk, match="no disk left; free some .* kept: .*step-000001"):
        save(checkpoints, 2)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["latest", "step-000001"]


def test_too_little_space_is_seen_before_anything_is_written(checkpoints, monkeypatch):
    usage = checkpoint.shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "write_pieces", None)
    with pytest.raises(NoDisk, match=r"needs 1\.00 MiB, 1\.00 MiB free"):
        save(checkpoints, 1)
    assert list(checkpoints.folder.iterdir()) == []


def test_a_parameter_of_another_shape_is_named(checkpoints):
    save(checkpoints, 1)
    other = tensors() | {"bf16": torch.zeros(7, 6, dtype=torch.bfloat16)}
    with pytest.raises(ModelError, match="'bf16' differs"):
        checkpoints.newest().read_into("parameters", other)


def test_an_optimizers_state_survives_json():
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.5, 0.25))
    parameter.grad = torch.randn(4, 3)
    optimizer.step()
    pulled = {}
    state = json.loads(json.dumps(pull_tensors(optimizer.state_dict(), pulled)))
    back = push_tensors(state, pulled)
    assert back["param_groups"] == optimizer.state_dict()["param_groups"]
    assert sorted(pulled) == ["state.0.exp_avg", "state.0.exp_avg_sq", "state.0.step"]
    assert all(back["state"][0][k] is v for k, v in optimizer.state_dict()["state"][0].items())
    with pytest.raises(TypeError, match="a.b is a object"):
        pull_tensors({"a": {"b": object()}}, {})


def test_every_saver_writes_the_same_files(tmp_path):
    folders = []
    for way in WAYS:
        saver = book.make("checkpoint", way).start(torch.device("cpu"))
        folders.append(save(Checkpoints(tmp_path / way, saver), 3))
    first, *others = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert others and all(other == first for other in others)


def test_the_end_of_a_run_waits_for_the_disk_and_tells_what_went_wrong(checkpoints, monkeypatch):
    with checkpoints:
        checkpoints.save(1, {}, {"parameters": tensors()})
    assert checkpoints.newest().state["step"] == 1

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(NoDisk), checkpoints:
        checkpoints.save(2, {}, {"parameters": tensors()})
    with pytest.raises(ZeroDivisionError), checkpoints:
        with contextlib.suppress(NoDisk):  # what is met in the background comes later, or not at all
            checkpoints.save(3, {}, {"parameters": tensors()})
        raise ZeroDivisionError
    assert checkpoints.newest().state["step"] == 1


def test_an_optimizers_state_is_there_once_while_it_is_read(tmp_path):
    """Read into place: what the file holds becomes the state itself."""
    parameter, moments = torch.nn.Parameter(torch.zeros(256, 256)), {}
    first, second = (book.make("optimizer", "adamw").build([("weight", parameter)], 1e-3, 0) for _ in range(2))
    parameter.grad = torch.ones_like(parameter)
    first.step()
    checkpoints = Checkpoints(tmp_path, book.make("checkpoint", "blocking").start(torch.device("cpu")))
    checkpoints.save(1, {"optimizer": pull_tensors(first.state_dict(), moments)}, {"optimizer": moments})
    saved = checkpoints.newest()
    with Tracker("read") as tracker:
        second.load_state_dict(push_tensors(saved.state["optimizer"], saved.read("optimizer")))
    levels = list(itertools.accumulate(size for _, size in tracker.segments[0].events))
    held = sum(tensor.nbytes for tensor in moments.values())
    assert levels[-1] == held <= max(levels) < 1.5 * held
    restored = {}
    pull_tensors(second.state_dict(), restored)
    assert equal(restored, moments)
