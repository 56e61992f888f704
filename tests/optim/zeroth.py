"""A convex toy for the zeroth-order methods, and what each of them has to do."""

import copy

import torch
from torch import nn

from tests.optim import common


def quadratic(dtype=torch.float32, shapes=((12, 8),)):
    """Named parameters, their loss without a graph of its own, and its gradient where they stand."""
    rng = torch.Generator().manual_seed(1)
    named = [
        (f"layers.{i}.w", nn.Parameter(torch.randn(shape, generator=rng).to(dtype))) for i, shape in enumerate(shapes)
    ]
    targets = [torch.randn(shape, generator=rng) for shape in shapes]

    def loss():
        value = sum((p.double() - t).square().sum() / 2 for (_, p), t in zip(named, targets, strict=True))
        if torch.is_grad_enabled():
            value.backward()
        return value

    def gradients():
        return [p.detach().float() - t for (_, p), t in zip(named, targets, strict=True)]

    return named, loss, gradients


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


def check_the_mean_of_many_estimates_is_the_gradient(method, dtype=torch.float32, near=0.98):
    """E[rho z] is the gradient: its cosine is that of a mean of independent draws, 1 / sqrt(1 + (n + 1) / K)."""
    named, loss, gradients = quadratic(dtype)
    before, want = named[0][1].detach().float().clone(), gradients()[0]
    method.build(named, 1.0, 0).step(loss)
    assert cosine(before - named[0][1].detach().float(), want) > near


def check_every_update_descends(method, lr, dtype):
    named, loss, _ = quadratic(dtype)
    optimizer, start = method.build(named, lr, 0), value(loss)
    for _ in range(300):
        optimizer.step(loss)
    assert value(loss) < 0.6 * start
    assert all(p.grad is None for _, p in named)


def check_a_resumed_run_is_the_uninterrupted_one(method, dtype, lr=1e-2):
    """The state dict holds tensors and JSON, and all that the next steps depend on."""

    def run(stop=None):
        named, loss, _ = quadratic(dtype)
        optimizer = method.build(named, lr, 0)
        for step in range(8):
            if step == stop:
                saved = copy.deepcopy(optimizer.state_dict())
                assert all(
                    common.plain(v) or type(v) is torch.Tensor for s in saved["state"].values() for v in s.values()
                )
                assert common.plain(saved["param_groups"])
                optimizer = method.build(named, lr * 3, 9)
                optimizer.load_state_dict(saved)
            optimizer.step(loss)
        return [p.detach() for _, p in named]

    assert all(map(torch.equal, run(), run(stop=4)))


@torch.no_grad()
def value(loss):
    return float(loss())
