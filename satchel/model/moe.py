"""The sparse feed-forward: each token visits the few experts that a router prefers.

    y = sum over the k chosen e of weight[e] * expert_e(x)  (+ sigmoid(g . x) * shared(x))

Tokens are sorted by expert, each expert sees its own rows at once, and the results are put back in the tokens' order.
It keeps k copies of the tokens. Nothing is dropped and no capacity is set: the result does not depend on the batch.

How many rows each expert gets depends on the data. On fake and meta tensors, which have no data, the rows are shared
out evenly: the same bytes and operations in all, in batches that are as equal as can be.
"""

from typing import Unpack

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from satchel.model.config import ModelConfig
from satchel.model.empty import At, Linear
from satchel.model.feedforward import FeedForward
from satchel.model.functional import wide

# N tokens, K experts a token, D width, X experts


def rows_per_expert(expert_NK: Tensor, experts: int) -> list[int]:
    """How many of the N x K rows go to each expert; on fake and meta tensors as evenly as can be."""
    if expert_NK.is_meta or isinstance(expert_NK, FakeTensor):
        each, more = divmod(expert_NK.numel(), experts)
        return [each + (i < more) for i in range(experts)]
    return torch.bincount(expert_NK.flatten(), minlength=experts).tolist()


class SparseFeedForward(nn.Module):
    """A mixture of experts, with the names that most checkpoints use: `gate` is the router."""

    def __init__(self, config: ModelConfig, **at: Unpack[At]) -> None:
        super().__init__()
        self.per_token, self.normalize = config.experts_per_token, config.normalize_experts
        self.gate = Linear(config.width, config.experts, False, **at)
        self.experts = nn.ModuleList(FeedForward(config, config.expert_hidden, **at) for _ in range(config.experts))
        self.shared_expert = FeedForward(config, config.shared_hidden, **at) if config.shared_hidden else None
        self.shared_expert_gate = Linear(config.width, 1, False, **at) if config.shared_hidden else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        x_ND = x.reshape(-1, x.shape[-1])
        weight_NK, expert_NK = self.route(x_ND)
        y_ND = self._visit(x_ND, weight_NK, expert_NK)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y_ND = y_ND + self.shared_expert_gate(x_ND).sigmoid() * self.shared_expert(x_ND)
        return y_ND.view(x.shape)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' weights, in x's type, and their numbers, both [N, K]."""
        share_NX = self.gate(x_ND).softmax(-1, dtype=wide(x_ND.dtype))
        weight_NK, expert_NK = share_NX.topk(self.per_token, dim=-1)
        if self.normalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return weight_NK.to(x_ND.dtype), expert_NK

    def _visit(self, x_ND: Tensor, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
        order = expert_NK.flatten().argsort(stable=True)
        rows = x_ND[order // self.per_token].split(rows_per_expert(expert_NK, len(self.experts)))
        visited = torch.cat([expert(r) for expert, r in zip(self.experts, rows, strict=True) if r.shape[0]])
        visited_NKD = visited[order.argsort()].view(*expert_NK.shape, -1)
        return torch.bmm(weight_NK[:, None], visited_NKD)[:, 0]
