"""What an operator takes beside its result, where the library inside of torch allocates it unseen."""

import gc
from itertools import accumulate

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from satchel.native import adam, linear
from satchel.optim import _directions, _shared, adafactor, lion, muon, natural_galore
from satchel.run.memory import install_pool
from satchel.run.tracker import Tracker

needs_pool = pytest.mark.skipif(install_pool() is None, reason="no page pool")

OPERATORS = {
    "a wider operand": lambda b, f: b * f,
    "a wider operand that is broadcast": lambda b, f: b * f[:, :1],
    "a result that is narrower": lambda b, f: b.mul_(f),
    "a narrower operand": lambda b, f: f.add_(b),
    "two narrower operands": lambda b, f: torch.addcmul(f, b, b),
    "a number": lambda b, f: b * torch.tensor(2.0),
    "one type": lambda b, f: f.mul_(f),
    "a copy": lambda b, f: f.copy_(b),
}


@needs_pool
@pytest.mark.parametrize("name", OPERATORS)
def test_operands_of_two_types_take_what_the_pool_measures(name):
    real = torch.ones(700, 900).bfloat16(), torch.ones(700, 900)
    assert seen(OPERATORS[name], *real) == pytest.approx(measured(OPERATORS[name], *real), abs=1 << 14)


def measured(operator, *arguments) -> int:
    """Bytes at most beside the arguments, by the pool."""
    pool = install_pool()
    gc.collect()  # what an earlier test left is not let go in between
    pool.reset_peak()
    before = pool.peak_bytes
    _result = operator(*arguments)  # alive until the end
    return pool.peak_bytes - before


def seen(operator, *arguments) -> int:
    """The same by a tracker, of fake tensors like these."""
    with FakeTensorMode() as mode, Tracker() as tracker:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        tracker.label((t for t in tree_leaves(fake) if isinstance(t, torch.Tensor)), "weights")
        tracker.mark("run")
        _result = operator(*fake)
        tracker.mark("end")
    return max(accumulate((size for _, size in tracker.segments[1].events), initial=0))


ROWS, COLUMNS = 1024, 512
COUNT = ROWS * COLUMNS  # four slices
TABLE = 260 << 10  # bytes of what reads 8 bits, which is there already
RATES = (0.9, 0.99, 1e-8, 1e-3, 1.0, 3)
HOW = ([7], 1e-3, 0, 0)


def moments(store: str) -> list[torch.Tensor]:
    return list(_shared.zero_moments(store, COUNT, torch.device("cpu")).values())


def narrow() -> torch.Tensor:
    return torch.full((COUNT,), 0.5, dtype=torch.bfloat16)


def matrix() -> torch.Tensor:
    return narrow().view(1, ROWS, COLUMNS)


def lion_of(store: str) -> tuple:
    held = moments(store)
    return (lion.lion_, narrow(), narrow(), held[: len(held) // 2], None, store, "nearest", 0.9, 0.99, 0.1, 1.0, 3)


def factored() -> tuple:
    return torch.ones(1, ROWS), torch.ones(1, COLUMNS), None, "stochastic", 0.5, 0.1, 1.0, True, 1.0, 3


BODIES = {
    "adam": lambda: (_shared.adam_, narrow(), narrow(), moments("bf16"), "bf16", "stochastic", *RATES),
    "adam, fp32": lambda: (_shared.adam_, *torch.ones(2, COUNT), moments("fp32"), "fp32", "nearest", *RATES),
    "adam, 8bit": lambda: (_shared.adam_, narrow(), narrow(), moments("8bit"), "8bit", "stochastic", *RATES),
    "move": lambda: (_shared.move_, narrow(), torch.ones(COUNT), None, "stochastic", 1.0, 3),
    "lion": lambda: lion_of("bf16"),
    "lion, 8bit": lambda: lion_of("8bit"),
    "momentum": lambda: (muon.momentum_, narrow(), narrow(), moments("bf16")[:1], "bf16", 0.9, True, 3),
    "natural": lambda: (natural_galore.natural_, torch.ones(COUNT), narrow(), torch.stack([narrow()] * 4), 1, 0.1),
    "adafactor": lambda: (adafactor.adafactor_, matrix(), matrix(), *factored()),
    "perturb": lambda: (_directions.perturb_, narrow(), None, 0, 1, *HOW),
    "descend": lambda: (_directions.descend_, narrow(), None, None, torch.ones(1), *HOW, "nearest", 0.0, 0.1, 1.0, 3),
    "estimate": lambda: (_directions.estimate, narrow(), None, torch.ones(1), *HOW),
}


@needs_pool
@pytest.mark.parametrize("name", BODIES)
def test_what_the_body_of_our_own_operator_takes_is_what_the_pool_measures(name, monkeypatch):
    monkeypatch.setattr(adam, "kernel", lambda: None)
    operator, *real = BODIES[name]()
    operator(*real)  # tables that are made once
    found = measured(operator, *real)
    assert found > 1 << 19
    assert seen(operator, *real) == pytest.approx(found, rel=0.01, abs=TABLE if "8bit" in name else 0)


def test_an_operator_does_its_work_once_on_real_arguments(monkeypatch):
    monkeypatch.setattr(adam, "kernel", lambda: None)
    (operator, *plain), (_, *watched) = BODIES["adam"](), BODIES["adam"]()
    operator(*plain)
    with Tracker():
        operator(*watched)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(plain[:3]), tree_leaves(watched[:3]), strict=True))


@needs_pool
@pytest.mark.skipif(linear.kernel() is None, reason="no C++ compiler")
@pytest.mark.parametrize("shape", [(700, 1024), (350, 2, 1024)])
def test_what_a_product_with_tiles_takes_is_what_the_pool_measures(shape):
    generator = torch.Generator().manual_seed(0)
    tiles = linear.example("Q8_0", 512, 1024, generator)
    x = torch.randn(shape, generator=generator).bfloat16()
    if len(shape) == 3:
        x = x.transpose(0, 1)  # whose rows are copied
    arguments = (x, tiles, None, "Q8_0", 512, linear.kernel().level)
    found = measured(torch.ops.satchel.tiled_linear, *arguments)
    assert found > 3 * x[..., 0].numel() * 512
    assert seen(torch.ops.satchel.tiled_linear, *arguments) == pytest.approx(found, abs=1 << 14)


def test_a_kernel_takes_nothing_beside_its_arguments():
    if adam.kernel() is None:
        pytest.skip("no C++ compiler")
    operator, *real = BODIES["adam"]()
    assert seen(operator, *real) == 0
