"""The kernel does what the torch path does, for all dtypes, stores and roundings, on any number of threads."""

import itertools

import pytest
import torch

from satchel.native import adam
from satchel.native.adam import kernel, takes
from satchel.native.build import ARITHMETIC, build, compiler
from satchel.optim import _shared
from satchel.optim._shared import adam_, adam_in_torch_, move_, move_in_torch_, zero_moments
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CPU, WIDE, NARROW = torch.device("cpu"), torch.float32, torch.bfloat16
DTYPES, STORES, ROUNDINGS = (WIDE, NARROW), ("fp32", "bf16", "8bit"), ("stochastic", "fp32", "nearest")
COUNT = 2 * (1 << 16) + 259  # three chunks of work, the last ends in a part of a block
PAIRS = list(itertools.product(DTYPES, DTYPES))
EVERY = [(*pair, store, rounding) for pair in PAIRS for store in STORES for rounding in ROUNDINGS]


def spread(count, dtype, seed):
    """Values over several orders of magnitude, as gradients are."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=rng) * torch.randn(count, generator=rng).exp() * 1e-3).to(dtype)


def low_bits(count, x_dtype, rounding):
    return [torch.zeros(count, dtype=torch.int16)] if rounding == "fp32" and x_dtype == NARROW else []


def stepped(step_, x_dtype, g_dtype, store, rounding, *, beta1=0.9, seed=5, steps=3, count=COUNT, lr=1e-3):
    """The parameter and what is held of it after some steps."""
    x = spread(count, x_dtype, 0)
    held = [moment for _, moment in sorted(zero_moments(store, count, CPU).items())] + low_bits(
        count, x_dtype, rounding
    )
    for step in range(steps):
        g = spread(count, g_dtype, 1 + step)
        step_(x, g, held, store, rounding, beta1, 0.999, 1e-8, lr, 0.99, seed + step)
    return x, *held


def values(x, *held, split):
    """What a parameter stands for."""
    return _shared.join(x, held[-1]) if split else x.float()


@pytest.mark.parametrize(("x_dtype", "g_dtype", "store", "rounding"), EVERY)
def test_a_step_equals_the_torch_path(x_dtype, g_dtype, store, rounding):
    """Moments bit for bit; parameters up to the last bit of torch's square root, which may turn a rounding over."""
    got, want = (stepped(f, x_dtype, g_dtype, store, rounding) for f in (adam_, adam_in_torch_))
    split = bool(low_bits(1, x_dtype, rounding))
    for ours, theirs in zip(got[1 : len(got) - split], want[1 : len(want) - split], strict=True):
        assert torch.equal(ours, theirs)
    x, y = values(*got, split=split), values(*want, split=split)
    turned = (x - y).abs() > TOLERANCE[WIDE] * y.abs() + 1e-8
    assert turned.sum() <= (COUNT / 10_000 if x_dtype == NARROW and not split else 0)
    assert ((x - y).abs() <= 2**-7 * y.abs() + 1e-8).all()


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5])
def test_a_short_memory_of_the_first_moment_equals_the_torch_path(beta1):
    got, want = (stepped(f, WIDE, WIDE, "fp32", "nearest", beta1=beta1) for f in (adam_, adam_in_torch_))
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(("x_dtype", "step_dtype"), PAIRS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_move_equals_the_torch_path_bit_for_bit(x_dtype, step_dtype, rounding):
    ends = []
    for f in (move_, move_in_torch_):
        x, low = spread(COUNT, x_dtype, 0), low_bits(COUNT, x_dtype, rounding)
        f(x, spread(COUNT, step_dtype, 1), low[0] if low else None, rounding, 0.99, 7)
        ends.append([x, *low])
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("store", STORES)
def test_threads_change_nothing(store):
    before, ends = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ends.append(stepped(adam_, NARROW, NARROW, store, "stochastic"))
    finally:
        torch.set_num_threads(before)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_the_seed_decides_the_noise_and_nothing_else_does():
    first, same, other = (stepped(adam_, NARROW, NARROW, "bf16", "stochastic", seed=s) for s in (1, 1, 100))
    assert torch.equal(first[0], same[0]) and torch.equal(first[2], same[2])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])
    assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_stochastic_rounding_is_right_on_average(share):
    """A parameter of one moved up by a share of the distance to its neighbour, 2^-7."""
    x, count = torch.ones(400_000, dtype=NARROW), 400_000
    move_(x, torch.full((count,), share * 2**-7), None, "stochastic", 1.0, 3)
    assert set(x.unique().tolist()) <= {1.0, 1 + 2**-7}
    assert abs((x != 1).double().mean().item() - share) <= 5 * (share * (1 - share) / count) ** 0.5


def test_roundings_of_a_parameter_and_its_second_moment_are_independent():
    """Where one is rounded up tells nothing of the other: both have two values only."""
    count = 400_000
    held = [torch.zeros(count, dtype=NARROW), torch.ones(count, dtype=NARROW)]
    x, g = torch.ones(count, dtype=NARROW), torch.full((count,), 3.0)
    adam_(x, g, held, "bf16", "stochastic", 0.9, 0.9995, 1e-8, 0.01, 1.0, 11)
    up = torch.stack([(t == t.max()).double() for t in (x, held[1])])
    assert (up.mean(1) > 0.2).all() and (up.mean(1) < 0.8).all()
    assert abs(torch.corrcoef(up)[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257])
@pytest.mark.parametrize("store", STORES)
def test_few_elements(count, store):
    got, want = (stepped(f, NARROW, NARROW, store, "nearest", count=count) for f in (adam_, adam_in_torch_))
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize("store", STORES)
def test_a_nan_stays_one_and_stays_where_it_is(store):
    held = [moment for _, moment in sorted(zero_moments(store, 512, CPU).items())]
    x, g = torch.ones(512, dtype=NARROW), torch.ones(512)
    g[7] = float("nan")
    for seed in range(2):
        adam_(x, g, held, store, "nearest", 0.9, 0.999, 1e-8, 1e-3, 1.0, seed)
    assert x[7].isnan() and not x[256:].isnan().any()
    assert store == "8bit" or x.isnan().sum() == 1  # 8 bits: the block's scale is its largest value


def test_what_it_does_not_take_goes_the_torch_path():
    x, g, held = torch.ones(300), torch.ones(300, dtype=torch.float16), [torch.zeros(300), torch.zeros(300)]
    assert takes(x) and not takes(g) and not takes(torch.ones(4, 4).T)
    adam_(x, g, held, "fp32", "nearest", 0.9, 0.999, 1e-8, 1e-3, 1.0, 0)
    assert (x < 1).all()


def test_one_build_a_machine_and_flags(tmp_path):
    first = build("adam", ARITHMETIC, tmp_path)
    made = first.stat().st_mtime_ns
    assert build("adam", ARITHMETIC, tmp_path) == first and first.stat().st_mtime_ns == made
    assert build("adam", ("-O0",), tmp_path) != first
    assert build("adam", ("--no-such-flag",), tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_compiler_the_torch_path_steps(monkeypatch):
    want = stepped(adam_in_torch_, NARROW, NARROW, "bf16", "stochastic")
    assert kernel() is not None
    monkeypatch.setattr(adam, "kernel", lambda: None)
    got = stepped(adam_, NARROW, NARROW, "bf16", "stochastic")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
