"""Under AddressSanitizer and UndefinedBehaviorSanitizer the kernels pass their tests, and nothing is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from satchel.native.build import compiler

ROOT = Path(__file__).parent.parent.parent
TESTS = ["tests/native", "tests/model/test_paged.py", "tests/model/test_bank.py"]  # they call every kernel
BEYOND = """
import torch
from satchel.native import pointwise
x = torch.ones(4, 16)
pointwise.library().satchel_rms_norm(x.data_ptr(), x.data_ptr(), x.data_ptr(), 5, 16, 1e-5, 0.0, 0, 0, 1)
"""


def libraries():
    """What has to be loaded before all else, where the compiler is GCC and has it."""
    names = ("libasan.so", "libstdc++.so")
    said = [
        subprocess.run([compiler() or "false", f"-print-file-name={n}"], capture_output=True, text=True) for n in names
    ]
    return [done.stdout.strip() for done in said if done.stdout.startswith("/")]


def sanitized(*command):
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{Path(__file__).parent / 'sanitize'}:{ROOT}",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or len(libraries()) < 2, reason="needs GCC and its libasan"),
]


def test_what_reads_beyond_its_tensor_is_found():
    done = sanitized("-c", BEYOND)
    assert done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("seed", [0, 1])
def test_random_calls_touch_nothing_but_their_tensors(seed):
    done = sanitized("-m", "tests.native.fuzz", "400", str(seed))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernels_own_tests_pass_and_nothing_is_found():
    done = sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
