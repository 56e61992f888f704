"""The slope that one forward pass finds is the gradient's part along the direction."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from satchel.core.errors import UserError
from satchel.optim._directions import estimate
from satchel.optim._zeroth import Part
from satchel.optim.forward_gradient import ForwardGradient
from satchel.run.assemble import assemble
from satchel.run.packing import pack
from satchel.run.step import StepLoss
from tests.optim import zeroth
from tests.run.test_step import uneven
from tests.run.toys import toy_decoder, toy_job

SLOPE = 1e-4  # the figure that the issue asks for
WIDE, NARROW = torch.float32, torch.bfloat16
LR = {"sgd": 5e-3, "sign": 2e-2, "momentum": 5e-4, "adam": 2e-2}


@torch.no_grad()
def slope(optimizer, closure):
    """rho, and z of each parameter."""
    parts = [Part(number, group, p) for number, (group, p) in enumerate(optimizer.index())]
    rho = optimizer.slope(parts, 0, closure)
    ones = torch.ones(1)
    return rho, [estimate(e.p.view(-1), None, ones, *optimizer.draw(e, 0)).view_as(e.p) for e in parts]


def along(optimizer, zs):
    """The part of the gradients along z."""
    return sum((p.grad * z).sum() for (_, p), z in zip(optimizer.index(), zs, strict=True))


@pytest.mark.parametrize("settings", [{"adapter": "none"}, {"adapter": "lora:rank=4"}, {"micro_batch": 2}])
def test_the_slope_is_gradient_dot_direction(tmp_path, settings):
    job = toy_job(tmp_path, optimizer="forward_gradient", clip=0.0, **settings)
    assembly = assemble(job, toy_decoder())
    with torch.no_grad():
        for _, p in assembly.parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    batches = pack(uneven(), range(12), 32).batches(range(6), job.micro_batch)
    closure = StepLoss(assembly, lambda: batches)
    rho, zs = slope(assembly.optimizer, closure)
    closure()
    assert float(rho) == pytest.approx(float(along(assembly.optimizer, zs)), rel=SLOPE)


def test_any_module_will_do_with_attention_too():
    """In a user's own loop; torch's fused attention knows no tangents, so that it is not what runs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(16, 48), nn.LayerNorm(16)

        def forward(self, x_BTD):
            q, k, v = self.inner(self.norm(x_BTD)).unflatten(-1, (3, 4, 4)).unbind(-3)
            return (
                F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).square().mean()
            )

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 9, 16)
    optimizer = ForwardGradient().build(list(model.named_parameters()), 0.0, 0)
    rho, zs = slope(optimizer, lambda: model(x))
    model(x).backward()
    assert float(rho) == pytest.approx(float(along(optimizer, zs)), rel=SLOPE)


def test_the_mean_of_many_estimates_is_the_gradient():
    zeroth.check_the_mean_of_many_estimates_is_the_gradient(ForwardGradient(directions=1500), near=0.95)


@pytest.mark.parametrize("dtype", [WIDE, NARROW])
@pytest.mark.parametrize("update", LR)
def test_every_update_descends(update, dtype):
    zeroth.check_every_update_descends(ForwardGradient(update=update), LR[update], dtype)


@pytest.mark.parametrize("update", LR)
def test_a_resumed_run_is_the_uninterrupted_one(update):
    zeroth.check_a_resumed_run_is_the_uninterrupted_one(ForwardGradient(update=update, sparsity=0.5), NARROW)


def test_weights_are_untouched_and_tangents_gone_after_the_slope_even_of_a_loss_that_raises():
    named, loss, _ = zeroth.quadratic(NARROW)
    before, optimizer = named[0][1].detach().clone(), ForwardGradient().build(named, 1e-3, 0)
    slope(optimizer, loss)
    with pytest.raises(MemoryError):
        optimizer.step(fail)
    assert torch.equal(named[0][1], before) and not optimizer.state[named[0][1]]


def fail():
    raise MemoryError


def test_the_loss_that_is_given_back_has_no_tangent():
    named, loss, _ = zeroth.quadratic()
    value = ForwardGradient().build(named, 0.0, 0).step(loss)
    assert float(value) == pytest.approx(zeroth.value(loss))


def test_a_loss_that_depends_on_nothing_has_no_slope():
    named, _, _ = zeroth.quadratic()
    before = named[0][1].detach().clone()
    ForwardGradient().build(named, 1.0, 0).step(lambda: torch.tensor(3.0))
    assert torch.equal(named[0][1], before)


def test_a_conservative_update_is_mezos_alone():
    with pytest.raises(UserError, match="no update 'conservative'; there is sgd, sign, momentum, adam"):
        ForwardGradient(update="conservative")
