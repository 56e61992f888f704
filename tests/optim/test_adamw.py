import itertools

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.native import adam
from satchel.optim._shared import join, land_, noises, split_
from satchel.optim.adamw import AdamW
from tests.optim import common
from tests.tolerances import TOLERANCE

ROUNDINGS, STORES = ("stochastic", "fp32", "nearest"), ("follow", "fp32", "bf16")
CPU = torch.device("cpu")
EXACT = TOLERANCE[torch.float32]


def torch_adamw(named, weight_decay):
    """torch's own, decaying matrices only."""
    matrices, vectors = ([p for _, p in named if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=common.LR, betas=(0.8, 0.95), eps=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_equals_torch(weight_decay):
    ours, theirs = common.parameters(), common.parameters()
    method = AdamW(beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=weight_decay)
    got = common.run(method.build(ours, common.LR, 0), ours, range(50))
    want = common.run(torch_adamw(theirs, weight_decay), theirs, range(50))
    torch.testing.assert_close(got, want, rtol=EXACT, atol=1e-6)


def test_exact_rounding_of_bfloat16_follows_the_float32_master():
    common.check_exact_rounding_follows_the_float32_master(AdamW(rounding="fp32", moments="fp32"), AdamW(), 20)


def test_split_and_join_are_exact_and_high_is_nearest():
    wide = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    high, low = torch.empty(10_000, dtype=torch.bfloat16), torch.empty(10_000, dtype=torch.int16)
    split_(high, low, wide.clone())
    assert torch.equal(join(high, low), wide)
    assert ((high.double() - wide.double()).abs() <= (wide.bfloat16().double() - wide.double()).abs()).all()


def test_stochastic_rounding_is_right_on_average_and_keeps_exact_values():
    count = 400_000
    step = 2.0**-7  # between neighbours at 1
    for share in (0.0, 0.1, 0.5, 0.9):
        x = torch.empty(count, dtype=torch.bfloat16)
        land_(x, torch.full((count,), -1 - share * step), noises(round(share * 10), slice(0, count), CPU)[0])
        assert set(x.unique().tolist()) <= {-1.0, -1 - step}
        up = (x != -1).double().mean().item()
        assert abs(up - share) <= 5 * (share * (1 - share) / count) ** 0.5 + 1e-4 * (share > 0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("seed", [0, 1, 0xFFFF_FFFF])
def test_noise_is_uniform(which, seed):
    draws = noises(seed, slice(0, 1_000_003), CPU)[which]
    assert draws.min() >= 0 and draws.max() < 1 << 16
    for digit in (draws >> 8, draws & 0xFF):
        counts = torch.bincount(digit, minlength=256).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 350  # chi-square, 255 degrees: p < 1e-4


def test_noises_are_independent_of_each_other_their_neighbours_and_other_seeds():
    whole = slice(0, 400_000)
    x, v = (n.double() for n in noises(7, whole, CPU))
    others = [v, x.roll(1), v.roll(1), x.roll(256), *(noises(seed, whole, CPU)[0].double() for seed in (8, 9, 1 << 31))]
    others += [noises(7, slice(1 << 20, (1 << 20) + 400_000), CPU)[0].double()]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 5 / 400_000**0.5
    assert torch.equal(noises(7, slice(1000, 2000), CPU)[0].double(), x[1000:2000])


def test_small_updates_survive_in_bfloat16_but_not_with_rounding_to_nearest():
    moved = {}
    for rounding in ROUNDINGS:
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = AdamW(rounding=rounding, moments="fp32").build([("w", p)], 1e-4, 0)
        for _ in range(30):
            p.grad = torch.ones_like(p)
            optimizer.step()
        low = optimizer.state[p].get("low")
        exact = p.detach() if low is None else join(p.detach(), low)
        moved[rounding] = 1 - exact.double().mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(30e-4, rel=0.05)
    assert moved["fp32"] == pytest.approx(30e-4, rel=30 * 2**-24 / 30e-4)  # half a unit of float32 a step


def test_second_moment_in_bfloat16_is_right_on_average():
    p = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW(rounding="nearest").build([("w", p)], 1e-4, 0)
    for step in range(400):
        p.grad = torch.full_like(p, 1.0 if step < 10 else 0.5)
        optimizer.step()
    want = 1 - 0.999**10
    want = want * 0.999**390 + 0.25 * (1 - 0.999**390)
    assert optimizer.state[p]["exp_avg_sq"].double().mean().item() == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"), list(itertools.product((torch.float32, torch.bfloat16), ROUNDINGS, STORES))
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(AdamW(rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        common.check_fake_tensors_give_the_same_state(AdamW(rounding=rounding, moments=moments), dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named = common.parameters(dtype)
        optimizer = AdamW(rounding=rounding, moments=moments).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        count, narrow = sum(p.numel() for _, p in named), dtype == torch.bfloat16
        moment = 4 if moments == "fp32" or (moments == "follow" and not narrow) else 2
        assert common.state_bytes(optimizer) == count * (2 * moment + 2 * (narrow and rounding == "fp32"))


@pytest.mark.parametrize("compiled", [True, False])
def test_temporaries_are_a_few_slices_without_the_kernel_and_none_with_it(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(adam, "kernel", lambda: None)
    common.check_temporaries_are_bounded(AdamW(), 12 << 19 if adam.kernel() is None else 4096)


def test_the_seed_decides_the_noise():
    runs = {}
    for seed in (1, 1, 2):
        named = common.parameters(torch.bfloat16)
        got = torch.cat([p.view(-1) for p in common.run(AdamW().build(named, common.LR, seed), named, range(3))])
        assert seed not in runs or torch.equal(runs[seed], got)
        runs[seed] = got
    assert not torch.equal(runs[1], runs[2])


def test_parameters_without_gradient_are_left_alone():
    named = common.parameters()
    before = named[0][1].detach().clone()
    optimizer = AdamW().build(named, common.LR, 0)
    common.give_gradients(named, 0)
    named[0][1].grad = None
    optimizer.step()
    assert torch.equal(named[0][1], before) and named[0][1] not in optimizer.state


def test_a_changed_parameter_is_noticed_by_autograd():
    w = nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    AdamW().build([("w", w)], 1.0, 0).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("knobs", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0}, {"weight_decay": 2}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        AdamW(**knobs)


def test_half_precision_is_refused():
    with pytest.raises(UserError, match="train in bf16 or fp32"):
        AdamW().build([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.float16)))], 1e-3, 0)


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        named = common.parameters()
        common.run(AdamW().build(named, common.LR, 0), named, range(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
