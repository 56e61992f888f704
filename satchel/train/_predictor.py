"""Predicts from a block's input which of its tokens attention will look at, without running attention.

    p[j] = mean over the tokens of group j of x / rms(x)                                  [G, D]
    share[i, j] = softmax over j <= i of (p A)[i] . (p B)[j] / sqrt(R) + c[i - j]         [G, G]

The groups' shares of attention are learned by descent on their cross-entropy with the shares that a few queries are
seen to give: three matrix products of G rows, a step of fixed length, no moments. `seen` counts the lessons.

Shapes: N tokens of one document, G groups of tokens, S queries that are looked at, D width, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

NEAR = 8  # distances between groups, from 0, that have a bias of their own; beyond, all share the last
STEP = 0.02  # of every number on average, in an iteration
ITERATIONS = 8  # of a lesson


class Predictor(nn.Module):
    """One block's."""

    def __init__(self, width: int, rank: int, seed: int, device: torch.device) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        for name in ("A_DR", "B_DR"):
            start = torch.randn(width, rank, generator=rng) / math.sqrt(width)
            self.register_buffer(name, start.to(device))
        self.register_buffer("bias_C", torch.zeros(NEAR, device=device))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.A_DR: Tensor
        self.B_DR: Tensor
        self.bias_C: Tensor
        self.seen: Tensor

    def forward(self, pooled_GD: Tensor) -> Tensor:
        """The share of each group's attention that goes to each group before it, [G, G]."""
        return self._scores(pooled_GD).softmax(-1)

    def learn(self, pooled_GD: Tensor, rows_S: Tensor, shares_SG: Tensor) -> None:
        """Come nearer to the shares that queries of the groups `rows_S` were seen to give."""
        near_SG = _distance(len(pooled_GD), pooled_GD.device)[rows_S]
        for _ in range(ITERATIONS):
            slope_SG = (self(pooled_GD)[rows_S] - shares_SG).div_(math.sqrt(self.A_DR.shape[1]))
            q_SR, k_GR = pooled_GD[rows_S] @ self.A_DR, pooled_GD @ self.B_DR
            grad_A_DR = pooled_GD[rows_S].T @ (slope_SG @ k_GR)
            grad_B_DR = pooled_GD.T @ (slope_SG.T @ q_SR)
            grad_C = torch.zeros_like(self.bias_C).index_add_(0, near_SG.flatten(), slope_SG.flatten())
            for tensor, grad in ((self.A_DR, grad_A_DR), (self.B_DR, grad_B_DR), (self.bias_C, grad_C)):
                scale = tensor.square().mean().sqrt().clamp(min=0.02) / grad.square().mean().sqrt().clamp(min=1e-12)
                tensor.sub_(grad * scale, alpha=STEP)
        self.seen.add_(1)

    def _scores(self, pooled_GD: Tensor) -> Tensor:
        """Before the softmax; -inf for what comes later."""
        groups = len(pooled_GD)
        score_GG = (pooled_GD @ self.A_DR) @ (pooled_GD @ self.B_DR).T / math.sqrt(self.A_DR.shape[1])
        score_GG += self.bias_C[_distance(groups, pooled_GD.device)]
        return score_GG.masked_fill_(torch.ones_like(score_GG, dtype=torch.bool).triu_(1), -torch.inf)


def pool(x_ND: Tensor, group: int) -> Tensor:
    """The mean of each group of tokens, [G, D] in float32, each token and each mean brought to one length."""
    x_ND = functional.rms_norm(x_ND.float(), x_ND.shape[-1:])
    return functional.rms_norm(group_mean(x_ND, group), x_ND.shape[-1:])


def group_mean(x_ND: Tensor, group: int) -> Tensor:
    """The mean over each `group` tokens, the last of which may be fewer."""
    return group_sum(x_ND, group) / group_sum(torch.ones_like(x_ND[:, :1]), group)


def group_sum(x_ND: Tensor, group: int) -> Tensor:
    """The sum over each `group` tokens."""
    padded = functional.pad(x_ND, (0, 0, 0, -len(x_ND) % group))
    return padded.unflatten(0, (-1, group)).sum(1)


def _distance(groups: int, device: torch.device) -> Tensor:
    """Which bias stands between two groups, [G, G]."""
    index_G = torch.arange(groups, device=device)
    return (index_G[:, None] - index_G).clamp(0, NEAR - 1)
