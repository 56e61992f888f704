"""A device's curves: measured apart from the process that asks, kept, and read between their points."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from satchel.core import book
from satchel.core.errors import UserError
from satchel.run import device
from satchel.run.device import Device, Stopwatch, interpolate, methods, resolve
from satchel.run.tracker import Work, aten, work_of

THIN_AND_FAT = ((torch.ones(256, 8), torch.ones(8, 256)), (torch.ones(512, 512), torch.ones(512, 512)))
CURVE = [(1.0, 2.0), (100.0, 20.0), (1000.0, 200.0)]


def test_between_two_points_a_curve_is_a_power_law() -> None:
    assert interpolate(CURVE, 10.0) == pytest.approx((2.0 * 20.0) ** 0.5)
    assert interpolate(CURVE, 0.5) == 2.0
    assert interpolate(CURVE, 2000.0) == pytest.approx(400.0)


GENERAL = [(1.0, 1.0), (10.0, 1.0), (1000.0, 100.0)]


def seconds(work: Work, curve: list[tuple[float, float]], **fields) -> float:
    return Device("cpu", "toy", 1, 0, "", {"any": GENERAL, "known/float32": curve}, **fields).seconds(
        Counter({work: 2})
    )


def test_a_step_is_the_sum_of_its_calls_and_gaps_times_the_slowdown_of_its_dtype() -> None:
    work = Work("known/float32", 100, 1)
    assert seconds(work, CURVE) == pytest.approx(2 * 20.0)
    assert seconds(work, CURVE, gap_s=0.5) == pytest.approx(2 * 20.5)
    assert seconds(work, CURVE, slowdown={"float32": 3.0, "bfloat16": 7.0}) == pytest.approx(3 * 2 * 20.0)


def test_a_machine_that_became_slower_takes_as_much_longer(monkeypatch) -> None:
    monkeypatch.setattr(device, "gauge", {"cpu": 0.75}.__getitem__)
    found = replace(Device("cpu", "toy", 1, 0, "", {"any": GENERAL}), gauge_s=0.5)
    work = Counter({Work("known/float32", 0, 1000): 2})
    assert found.now().seconds(work) == pytest.approx(1.5 * found.seconds(work)) and found.now().now() == found.now()


def test_an_operator_that_was_never_timed_takes_what_any_one_takes() -> None:
    assert seconds(Work("unknown/float32", 0, 1000), CURVE) == pytest.approx(2 * 100.0)


def test_beyond_its_measured_sizes_a_copy_grows_as_any_does_and_a_product_in_proportion() -> None:
    point = [(10.0, 4.0)]
    assert seconds(Work("known/float32", 0, 1000), point) == pytest.approx(2 * 400.0)
    assert seconds(Work("known/float32", 0, 1), point) == pytest.approx(2 * 4.0)  # no quicker: any one is flat there
    assert seconds(Work("known/float32", 1000, 1), point) == pytest.approx(2 * 400.0)
    assert seconds(Work("known/float32", 64, 1), [(640.0, 1.0)]) == pytest.approx(2 * 1.0)  # never below the least call


def test_a_thin_product_is_known_by_its_bytes() -> None:
    thin, fat = (work_of(aten.mm.default, (x, y), {}, x @ y, [x, y, x @ y]) for x, y in THIN_AND_FAT)
    assert thin.kind == "product/float32/thin" and thin.size == thin.moved_bytes == 4 * (256 * 8 + 8 * 256 + 256 * 256)
    assert fat.kind == "product/float32" and fat.size == fat.flops == 2 * 512**3


def test_a_product_with_tiles_is_one_of_its_format_whatever_the_width_of_its_groups() -> None:
    tiled = torch.ops.satchel.tiled_linear.default
    for groups, rows, kind in (("INT8:64", 512, ""), ("INT8:768", 512, ""), ("INT8:768", 1, "/thin")):
        x, tiles = torch.ones(rows, 768), torch.ones(768 * 256, dtype=torch.uint8)
        out = torch.ones(rows, 256)
        found = work_of(tiled, (x, tiles, None, groups, 256, "auto"), {}, out, [x, tiles, out])
        assert found.kind == "tiled_linear/float32/INT8/auto" + kind and found.flops == 2 * rows * 768 * 256


def test_the_timed_jobs_cover_every_optimizer_and_format_of_the_book() -> None:
    jobs = [job for job, _ in methods()]
    for entry in book.entries():
        if entry.slot in ("optimizer", "format"):
            assert any(getattr(job, entry.slot) == entry.name for job in jobs), entry.name


def test_operators_are_timed_one_by_one_and_views_are_not() -> None:
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    with Stopwatch("cpu") as watch:
        (x @ y).T.relu()
        x @ y
    assert {item.kind: len(found) for item, found in watch.calls.items()} == {
        "product/float32/thin": 2,
        "relu/float32": 1,
    }


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="none of auto, cpu, cuda"):
        resolve("gpu")


def test_measuring_leaves_the_asking_process_as_small_as_it_was(tmp_path) -> None:
    code = """
import pathlib, sys, torch
from satchel.run.device import device
from satchel.run.memory import resident_bytes
torch.set_num_threads(1)
before = resident_bytes()
first = device("cpu", pathlib.Path(sys.argv[1]))
assert resident_bytes() - before < 16 << 20, resident_bytes() - before
assert device("cpu", pathlib.Path(sys.argv[1])) == first and first.slowdown and first.gap_s >= 0
assert first.gauge_s > 0 and first.pace == 1
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 1
