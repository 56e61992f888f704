"""A device's curves: measured apart from the process that asks, kept, and read between their points."""

import subprocess
import sys
from collections import Counter

import pytest

from satchel.core.errors import UserError
from satchel.run.device import Device, interpolate, resolve
from satchel.run.tracker import Work

CURVE = [(1.0, 2.0), (100.0, 20.0), (1000.0, 200.0)]


def test_between_two_points_a_curve_is_a_power_law() -> None:
    assert interpolate(CURVE, 10.0) == pytest.approx((2.0 * 20.0) ** 0.5)
    assert interpolate(CURVE, 0.5) == 2.0
    assert interpolate(CURVE, 2000.0) == pytest.approx(400.0)


def test_a_call_takes_the_longer_of_computing_and_moving_times_the_slowdown_of_its_dtype() -> None:
    curves = {"move": [(1.0, 1.0), (10.0, 10.0)], "float32": [(1.0, 5.0), (10.0, 50.0)]}
    device = Device("cpu", "toy", 1, 0, "", curves, {"float32": 3.0})
    assert device.seconds(Counter({Work("float32", 1, 1): 2, Work("move", 0, 10): 1})) == pytest.approx(3 * 20.0)


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
assert device("cpu", pathlib.Path(sys.argv[1])) == first and first.slowdown
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 1
