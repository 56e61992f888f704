"""Kernels for AMX pass their tests on a processor that has none: its tiles in software (emulate/amx.h)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from satchel.native import levels
from satchel.native.build import compiler

ROOT = Path(__file__).parent.parent.parent
TESTS = [
    "tests/model/test_paged.py",
    "tests/model/test_stack.py",
    "tests/model/test_bank.py",
    "tests/native/test_linear.py",
]

pytestmark = pytest.mark.skipif(
    compiler() is None or levels.supported()[0] != "avx512" or "avx512_bf16" not in levels._features(),
    reason="needs a compiler and a processor with AVX-512 for bfloat16, but without AMX",
)


def emulated(*command):
    path = os.pathsep.join([str(Path(__file__).parent / "emulate"), str(ROOT)])
    command = [sys.executable, *command]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


def passes(tests):
    done = emulated("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_products_and_attention_go_through_the_tiles():
    said = emulated(
        "-c", "from satchel.native import linear, paged; print(linear.kernel('auto').level, paged.library())"
    )
    assert said.stdout.startswith("amx <"), said.stderr[-3000:]
    passes(["tests/model/test_paged.py", "-k", "bits_do_not_depend or only_shares or several_chunks"])


@pytest.mark.slow
def test_their_tests_pass():
    passes(TESTS)
