"""Tune a frozen linear map through two thin matrices beside it.

    y = W x + (alpha / rank) B A x        A [R, I] uniform in +-1/sqrt(I), B [O, R] zero: at birth y is the base's

Saves gradients and optimizer state of the base's O * I weights, keeps R * (I + O) in float32. Spends quality where the
task needs a change of high rank, and compute of 6 N R (I + O) operations a step beside the base's own.
Limit: `dropout` acts on the input of A only, and costs a copy of it.
Paper: https://arxiv.org/abs/2106.09685
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from satchel.adapt._lowrank import expand, project
from satchel.core.seams import Adapter, Card
from satchel.model.linear import features

# N tokens, I inputs, O outputs, R rank


class LowRank(nn.Module):
    """The two matrices of one adapted map; parameters in float32 unless the module is cast, arithmetic in x's dtype."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, rng: torch.Generator | None) -> None:
        super().__init__()
        inputs, outputs = features(base)
        self.scale, self.dropout = scale, dropout
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        start_RI = torch.empty(rank, inputs, device=rng.device if rng else device)
        self.A_RI = nn.Parameter(start_RI.uniform_(-1, 1, generator=rng).div_(math.sqrt(inputs)).to(device))
        self.B_OR = nn.Parameter(torch.zeros(outputs, rank, device=device))

    def forward(self, x_NI: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapted map's output, [N, O]."""
        return expand(*self.branches(x_NI, base), self.B_OR, self.scale)

    def branches(self, x_NI: Tensor, base: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The base's output [N, O], and A x [N, R]."""
        if self.training and self.dropout:
            return base(x_NI), project(functional.dropout(x_NI, self.dropout), self.A_RI)[1]
        x_NI, h_NR = project(x_NI, self.A_RI)
        return base(x_NI), h_NR

    def product(self) -> Tensor:
        """scale * B A, [O, I] in float32."""
        return self.B_OR.detach().float() @ self.A_RI.detach().float() * self.scale


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """LoRA of Hu et al.: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2106.09685",
        saves=("gradients", "optimizer"),
        spends=("adapter", "quality"),
        fidelity="approx",
        claim="GPT-3 175B: 10,000x fewer trained parameters, 3x less GPU memory than full tuning with Adam",
        dial=("rank", 1, 256),
        reference="peft",
        demo={"rank": 4},
    )

    rank: int = 8  # R, at least 1
    alpha: float = 16.0  # strength: B A is scaled by alpha / rank
    dropout: float = 0.0  # share of A's inputs that is dropped while training, [0, 1)
    targets: tuple[str, ...] = ()  # maps by name or shell pattern, q_proj+v_proj; none: all but head and routers

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, f"rank={self.rank} is below 1; 8 suits most tasks")
        self.require(0 <= self.dropout < 1, f"dropout={self.dropout} is outside [0, 1); 0.05 is usual")
        self.require(self.alpha != 0, "alpha=0 switches the adapter off; 16 suits most ranks")

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank

    def attach(self, path: str, base: nn.Module, rng: torch.Generator | None) -> nn.Module:
        """A `LowRank` for the map at `path`."""
        return LowRank(base, self.rank, self.scale, self.dropout, rng)

    def delta(self, module: LowRank, base: nn.Module) -> Tensor:
        """scale * B A, [O, I] in float32."""
        return module.product()
