"""Blockwise attention equals the formula, forward and backward, for windows, soft caps, shared heads and a past."""

import pytest
import torch

from satchel.model import attend as module
from satchel.model.attend import attend, attend_documents
from tests.tolerances import TOLERANCE

CASES = [{}, {"window": 3}, {"cap": 2.0}, {"cap": 1.5, "window": 4}]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(q, k, v, *, scale, window=None, cap=None):
    groups, past = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = (t.repeat_interleave(groups, 2).transpose(1, 2) for t in (k, v))
    score = q.transpose(1, 2) @ k.mT * scale
    score = score if cap is None else cap * (score / cap).tanh()
    ahead = torch.arange(k.shape[2]) - torch.arange(past, k.shape[2])[:, None]
    score = score.masked_fill((ahead > 0) | (ahead <= -(window or k.shape[2])), -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("queries", [1, 4, 7])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_its_formula(case: dict, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)
    q, k, v = draw(2, queries, 4, 6, seed=0), draw(2, 7, 2, 6, seed=1), draw(2, 7, 2, 6, seed=2)
    torch.testing.assert_close(attend(q, k, v, scale=0.3, **case), formula(q, k, v, scale=0.3, **case))


@pytest.mark.parametrize("case", CASES[1:])
def test_blockwise_gradients_are_those_of_the_formula(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)
    inputs = [draw(2, 5, heads, 4, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, scale=0.7, **case), inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "short"), [(torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 0)])
def test_documents_of_a_row_do_not_see_each_other(
    case: dict, dtype: torch.dtype, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORT", short)
    q, k, v = (draw(1, 12, heads, 6, seed=heads, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    out = attend_documents(q, k, v, (5, 1, 6), scale=0.4, **case)
    alone = [formula(*(t[:, a:b].double() for t in (q, k, v)), scale=0.4, **case) for a, b in ((0, 5), (5, 6), (6, 12))]
    expected = torch.cat(alone, 1)
    assert (out - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    gradients = torch.autograd.grad(out.double().square().sum(), (q, k, v))
    for ours, exact in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert (ours - exact).norm() <= TOLERANCE[dtype] * exact.norm()
