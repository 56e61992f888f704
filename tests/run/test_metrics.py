"""Lines are whole and on the disk at once; a resumed run drops those that it is about to write again."""

import errno
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from satchel.core.errors import NoDisk
from satchel.run.metrics import MetricsLog, read_metrics
from satchel.run.plot import plot


def write(out, steps, begun=0):
    with MetricsLog(out, begun) as log:
        for step in steps:
            log.write({"step": step, "loss": 4.0 / (step + 1), "memory_bytes": 1 << 30})


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(3):
            log.write({"step": step})
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], begun=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_line_that_a_killed_run_left_incomplete_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, [3], begun=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is an extra")
def test_tensorboard_shows_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2, 3])
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 2.0), (2, pytest.approx(4 / 3)), (3, 1.0)]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_the_plot_is_a_picture_and_needs_a_step(tmp_path):
    lines = [{"step": 0, "held_out_loss": 3.0}, {"step": 1, "loss": 2.0, "memory_bytes": 1 << 30}]
    assert not plot(lines[:1], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    assert plot(lines, tmp_path / "metrics.png", budget_bytes=2 << 30)
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_as_such_and_only_once(tmp_path):
    with pytest.raises(NoDisk, match="no disk left; free some"), MetricsLog(tmp_path) as log:
        log._file.close()
        log._file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
        log.write({"step": 1, "loss": 1.0})


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_a_picture_that_the_disk_refuses_leaves_the_old_one(tmp_path, monkeypatch):
    def half(figure, path, **_):
        Path(path).write_text("half")
        raise FULL

    (tmp_path / "metrics.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(NoDisk):
        plot([{"step": 1, "loss": 1.0}], tmp_path / "metrics.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
