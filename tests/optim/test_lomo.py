"""Equal to the authors' package, step by step; the rest is in test_fused.py."""

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.core.seams import Closure
from satchel.optim.lomo import Lomo
from tests.optim import common
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]


def network():
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return model


def loss_of(model, step):
    rng = torch.Generator().manual_seed(100 + step)
    return (model(torch.randn(16, 24, generator=rng)) - torch.randn(16, 12, generator=rng)).square().mean()


class Clipped(Closure):
    """A backward pass of a user's own, with clipping."""

    def __init__(self, model, step, clip):
        self.model, self.number, self.clip = model, step, clip

    def __call__(self):
        loss = loss_of(self.model, self.number)
        loss.backward()
        return loss.detach()


def ours(form, clip, lr, steps, **knobs):
    model = network()
    optimizer = Lomo(form=form, scale=1.0, **knobs).build(list(model.named_parameters()), lr, 0)
    losses = [float(optimizer.step(Clipped(model, step, clip))) for step in range(steps)]
    return losses, list(model.parameters()), optimizer


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize(("form", "lr"), [("sgd", 0.1), ("ada", 0.01)])
def test_each_step_equals_the_authors(form, lr, clip, monkeypatch):
    package = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # its states are made on a GPU
    model, losses = network(), []
    kind, knobs = (package.Lomo, {}) if form == "sgd" else (package.AdaLomo, {"loss_scale": None})
    reference = kind(model, lr=lr, clip_grad_norm=clip or None, **knobs)
    for step in range(20):
        loss = loss_of(model, step)
        if clip:
            reference.grad_norm(loss)
            loss = loss_of(model, step)
        reference.fused_backward(loss, lr)
        losses.append(float(loss.detach()))
    found, parameters, _ = ours(form, clip, lr, 20)
    assert found == pytest.approx(losses, rel=EXACT)
    for p, q in zip(parameters, model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=EXACT, atol=1e-6)


def test_descent_has_no_state_and_adalomo_rows_and_columns():
    assert common.state_bytes(ours("sgd", 0.0, 0.1, 2)[2]) == 0
    rows_and_columns = 4 * sum(sum(p.shape) for p in network().parameters())
    assert common.state_bytes(ours("ada", 0.0, 0.1, 2)[2]) == rows_and_columns


def test_small_updates_survive_in_bfloat16():
    w = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))

    def closure():
        loss = w.sum()
        loss.backward()
        return loss

    optimizer = Lomo(scale=1.0).build([("w", w)], 1e-4, 0)
    for _ in range(30):
        optimizer.step(closure)
    assert 1 - w.detach().double().mean().item() == pytest.approx(30e-4, rel=0.05)


@pytest.mark.parametrize("knobs", [{"form": "adam"}, {"scale": -1.0}, {"rounding": "up"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Lomo(**knobs)
