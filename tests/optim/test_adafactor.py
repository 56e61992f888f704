import itertools

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.optim.adafactor import Adafactor
from satchel.optim.adamw import AdamW
from tests.optim import common
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]
SHAPES = common.SHAPES | {"model.layers.0.mlp.experts": (3, 16, 40)}


def reference(named, weight_decay):
    """torch's own, decaying matrices only."""
    matrices, vectors = ([p for _, p in named if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.Adafactor(groups, lr=common.LR, beta2_decay=-0.7, d=1.5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_equals_torch(weight_decay):
    ours, theirs = common.parameters(shapes=SHAPES), common.parameters(shapes=SHAPES)
    method = Adafactor(relative=True, decay=0.7, clip=1.5, weight_decay=weight_decay)
    optimizer, other = method.build(ours, common.LR, 0), reference(theirs, weight_decay)
    for step in range(50):
        got, want = common.run(optimizer, ours, [step]), common.run(other, theirs, [step])
        torch.testing.assert_close(got, want, rtol=EXACT, atol=1e-6)


def test_the_factored_second_moment_is_exact_for_a_gradient_of_rank_one():
    """So that the step is that of Adam without momentum; the paper's reason for this factorisation."""
    rng = torch.Generator().manual_seed(0)
    g = torch.rand(20, 1, generator=rng).add(0.5) @ torch.rand(1, 30, generator=rng).add(0.5)
    moved = {}
    for method in (Adafactor(), AdamW(beta1=0.0, eps=1e-30)):
        p = nn.Parameter(torch.zeros(20, 30))
        p.grad = g * torch.randn(20, 30, generator=rng).sign()
        method.build([("w", p)], 0.1, 0).step()
        moved[method.name] = p.detach().abs()
    torch.testing.assert_close(moved["adafactor"], moved["adamw"], rtol=EXACT, atol=0)


def test_steps_are_relative_only_where_asked():
    """A parameter that is 100 times larger moves 100 times further, or as far."""
    moved = {}
    for relative, size in itertools.product((True, False), (1.0, 100.0)):
        p = nn.Parameter(torch.full((8, 8), size))
        p.grad = torch.ones_like(p)
        Adafactor(relative=relative).build([("w", p)], 0.01, 0).step()
        moved[relative, size] = size - p.detach().mean().item()
    assert moved[True, 100.0] == pytest.approx(100 * moved[True, 1.0], rel=1e-3)
    assert moved[False, 100.0] == pytest.approx(moved[False, 1.0], rel=1e-3) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "rounding"), list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32")))
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding):
        common.check_resume_is_bit_identical(Adafactor(rounding=rounding), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding):
        common.check_fake_tensors_give_the_same_state(Adafactor(rounding=rounding), dtype)

    def test_state_is_rows_and_columns(self, dtype, rounding):
        named = common.parameters(dtype, shapes=SHAPES)
        optimizer = Adafactor(rounding=rounding).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        want = 4 * ((50 + 32) + (96 + 64) + (64 + 160) + 64 + 32 + 3 * (16 + 40))
        want += 2 * sum(p.numel() for _, p in named) * (rounding == "fp32" and dtype == torch.bfloat16)
        assert common.state_bytes(optimizer) == want


def test_exact_rounding_follows_the_float32_master():
    common.check_exact_rounding_follows_the_float32_master(Adafactor(rounding="fp32"), Adafactor())


def test_temporaries_are_a_few_slices():
    common.check_temporaries_are_bounded(Adafactor(), 12 << 19)


@pytest.mark.parametrize("knobs", [{"decay": 0.0}, {"clip": 0.5}, {"weight_decay": -1.0}, {"rounding": "up"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Adafactor(**knobs)
