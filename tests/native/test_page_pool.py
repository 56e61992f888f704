"""The page pool keeps contents, keeps no idle page, and keeps its limit. Each test has a process of its own."""

import subprocess
import sys

import pytest

from satchel.native.build import compiler

pytestmark = pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="needs Linux and a C++ compiler")

HEAD = """
import random
import torch
from satchel.run.memory import install_pool, resident_bytes
pool = install_pool()
MIB = 2**20
"""


def run(body: str) -> str:
    done = subprocess.run([sys.executable, "-c", HEAD + body], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents_survive_while_pages_move() -> None:
    body = """
rng, held = random.Random(0), {}
for turn in range(4000):
    if held and rng.random() < 0.5:
        key = rng.choice(list(held))
        tensor = held.pop(key)
        assert bool((tensor == key % 251).all()), key
    else:
        held[turn] = torch.full((rng.randrange(1, 3 * MIB),), turn % 251, dtype=torch.uint8)
assert all(bool((tensor == key % 251).all()) for key, tensor in held.items())
stats = pool._stats()
assert stats.moved > 0 and stats.faulted < 1.01 * stats.peak, (stats.moved, stats.faulted, stats.peak)
"""
    run(body)


def test_resident_bytes_equal_the_peak_of_live_bytes_after_fragmentation() -> None:
    body = """
before = resident_bytes()
pool.reset_peak()
small = [torch.ones(MIB // 2, dtype=torch.uint8) for _ in range(200)]
small = small[::2]                                           # 50 MiB stay, 50 MiB of holes
large = [torch.ones(10 * MIB, dtype=torch.uint8) for _ in range(5)]  # must be made of the holes
grown = resident_bytes() - before
assert abs(grown - pool.peak_bytes) < 3 * MIB, (grown, pool.peak_bytes)
assert pool.peak_bytes < 101 * MIB
"""
    run(body)


def test_limit_refuses_as_cuda_does_and_can_be_lifted() -> None:
    body = """
pool.limit(pool.live_bytes + 4 * MIB)
try:
    torch.ones(8 * MIB, dtype=torch.uint8)
except torch.OutOfMemoryError as error:
    assert "satchel memory budget" in str(error)
else:
    raise SystemExit("the limit did not hold")
torch.ones(2 * MIB, dtype=torch.uint8)
pool.limit(None)
torch.ones(8 * MIB, dtype=torch.uint8)
"""
    run(body)


def test_trim_gives_pages_back() -> None:
    body = """
block = torch.ones(64 * MIB, dtype=torch.uint8)
del block
held = resident_bytes()
pool.trim()
assert held - resident_bytes() > 60 * MIB
assert pool.resident_bytes - pool.live_bytes < MIB
"""
    run(body)


def test_results_are_the_default_allocators() -> None:
    body = """
torch.manual_seed(0)
x = torch.randn(64, 1024, requires_grad=True)
y = torch.nn.Linear(1024, 4096)(x).relu().square().mean()
y.backward()
print(repr(y.item()), repr(x.grad.double().sum().item()))
"""
    plain = subprocess.run(
        [sys.executable, "-c", "import torch\n" + body], capture_output=True, text=True, timeout=120, check=True
    )
    assert run(body) == plain.stdout


def test_reuse_of_small_holes_never_spends_all_mappings_that_the_kernel_allows() -> None:
    body = """
held = []
for _ in range(80):
    blocks = [torch.empty(20 << 10, dtype=torch.uint8) for _ in range(2000)]
    del blocks[::2]                                              # 1000 holes, from which a large tensor could be made
    held.append(torch.empty(20 * MIB, dtype=torch.uint8))
with open("/proc/self/maps") as maps:
    assert sum(1 for _ in maps) < 62_000
"""
    run(body)
