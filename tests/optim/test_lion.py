import itertools

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.optim.lion import Lion
from tests.optim import common

lion_pytorch = pytest.importorskip("lion_pytorch")


def reference(named, weight_decay, betas=(0.9, 0.99)):
    """lion-pytorch, decaying matrices only."""
    matrices, vectors = ([p for _, p in named if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return lion_pytorch.Lion(groups, lr=common.LR, betas=betas)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_equals_lion_pytorch_bit_for_bit(weight_decay):
    ours, theirs = common.parameters(), common.parameters()
    method = Lion(scale=1.0, beta1=0.8, beta2=0.95, weight_decay=weight_decay)
    optimizer, other = method.build(ours, common.LR, 0), reference(theirs, weight_decay, (0.8, 0.95))
    for step in range(50):
        common.run(optimizer, ours, [step])
        common.run(other, theirs, [step])
        assert all(torch.equal(p, q) for (_, p), (_, q) in zip(ours, theirs, strict=True))


def test_every_element_moves_by_the_same_amount():
    named = common.parameters()
    before = [p.detach().clone() for _, p in named]
    after = common.run(Lion(scale=0.5).build(named, common.LR, 0), named, range(1))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close((new - old).abs(), torch.full_like(old, common.LR / 2), rtol=1e-3, atol=0)


def test_scale_divides_the_learning_rate_but_not_the_decay():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones_like(p)
    Lion(scale=0.25, weight_decay=0.5).build([("w", p)], 0.1, 0).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 3), 1 - 0.1 * 0.5 - 0.1 * 0.25))


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_a_narrow_momentum_stays_near_the_float32_one(moments):
    """A momentum that shrinks by 1% a step would stand still where it is rounded to the nearest bfloat16."""
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = Lion(moments=moments).build([("w", p)], 1e-4, 0)
    for step in range(200):
        p.grad = torch.full_like(p, 1.0 if step < 20 else 0.2)
        optimizer.step()
    want = (1 - 0.99**20) * 0.99**180 + 0.2 * (1 - 0.99**180)
    state = optimizer.state[p]
    held = state["exp_avg"].float() if moments == "bf16" else None
    if held is not None:
        assert held.mean().item() == pytest.approx(want, rel=0.01)
    else:
        assert state["exp_avg_scale"].mean().item() == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(Lion(rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        common.check_fake_tensors_give_the_same_state(Lion(rounding=rounding, moments=moments), dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named = common.parameters(dtype)
        optimizer = Lion(rounding=rounding, moments=moments).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        width, want = 4 if dtype == torch.float32 else 2, 0
        for n in (p.numel() for _, p in named):
            eighth = n + 4 * -(-n // 256) if n >= 4096 else 4 * n
            want += eighth if moments == "8bit" else width * n
            want += 2 * n * (rounding == "fp32" and dtype == torch.bfloat16)
        assert common.state_bytes(optimizer) == want


def test_exact_rounding_follows_the_float32_master():
    common.check_exact_rounding_follows_the_float32_master(Lion(rounding="fp32", moments="fp32"), Lion())


def test_temporaries_are_a_few_slices():
    common.check_temporaries_are_bounded(Lion(), 12 << 19)


def test_the_usual_step_is_a_fifth_of_adamws_whatever_the_scale():
    for scale in (0.2, 1.0):
        assert Lion(scale=scale).usual_lr(1e-4, adapted=False) * scale == pytest.approx(2e-5)


@pytest.mark.parametrize("knobs", [{"beta1": 1.0}, {"beta2": -0.1}, {"scale": 0.0}, {"moments": "4bit"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Lion(**knobs)
