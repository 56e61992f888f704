"""The C library's heap: what it keeps of buffers that are gone."""

import subprocess
import sys

import pytest

KEPT = """
import ctypes, sys
from satchel.run.memory import resident_bytes, tame_heap
if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit(77)
if sys.argv[1] == "tamed":
    tame_heap()
bytearray(16 << 20)  # glibc learns from a freed map that buffers of this size belong on its heap
before = resident_bytes()
bodies, pins = [], []
for _ in range(8):
    bodies.append(b"x" * (8 << 20))
    pins.append(bytearray(100_000))  # lies behind the body, so that the heap cannot shrink
bodies.clear()
print((resident_bytes() - before) >> 20)
"""


def kept_mib(how):
    ran = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip("no glibc")
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_a_tame_heap_gives_back_what_bodies_held():
    assert kept_mib("tamed") <= 8 < 48 <= kept_mib("wild")
