"""APOLLO: each channel's gradient itself, scaled as AdamW would scale it in a small random subspace.

    for W [O, I] with O >= I: Q [R, I] of normal numbers / sqrt(R), drawn anew every `gap` steps;   L = G Q^T [O, R]
    D = Adam(L);   s = |D[o]| / |L[o]| for each row o, with bias correction;   U = s G sqrt(scale), |U| limited
    W = (1 - lr * weight_decay) (W - lr * U)

and mirrored, by columns, where O < I. The norm of s G grows by at most 1% a step. Matrices of blocks whose smaller side
is above `rank` are treated so; embeddings, head, norms and biases take plain AdamW.

State is 2 R max(O, I) moments and a number: Q is drawn again from its seed at every step, which is all that is kept of
it. Needs no singular value decomposition. Spends one product with Q and two passes over the gradient a step.
Paper: https://arxiv.org/abs/2412.05270
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.optim._landing import keep
from satchel.optim._projected import LowRank, ProjectedStepper, move_rows
from satchel.optim._projector import is_tall, lower, row_parts
from satchel.optim._shared import few_barriers, gradient

# O outputs and I inputs of a matrix, R rank

GROWTH = 1.01  # of the scaled gradient's norm from one step to the next, at most
TINY = 1e-8  # added to norms that divide


@dataclass(frozen=True, kw_only=True)
class Apollo(LowRank):
    """Gradient scaling by channels, approximated in a random subspace."""

    card = Card(
        paper="https://arxiv.org/abs/2412.05270",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="AdamW's perplexity or better, pre-training models up to 7B, with an eighth of its state",
        dial=("rank", 1, 1024),
        reference="apollo-torch",
        demo={"rank": 4, "gap": 10},
    )

    scale: float = 1.0  # the root of this multiplies the step, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.scale > 0, f"scale={self.scale} is not above 0; 1 is usual, 128 for a rank of 1")

    @property
    def granularity(self) -> str:
        """What has a scale of its own: each channel, or each tensor."""
        return "channel"

    def stepper(self) -> type[ApolloStepper]:
        """The torch optimizer of this method."""
        return ApolloStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"scale": self.scale, "granularity": self.granularity}


class ApolloStepper(ProjectedStepper):
    """State of a projected matrix beside Adam's on L: `basis_seed`, and `norm` [1], of the last scaled gradient."""

    @few_barriers()
    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one matrix, in place."""
        if self.due(state, group):
            state["basis_seed"] = seed
        low = lower(gradient(p), random_basis(p, group["rank"], state["basis_seed"]))
        self.start(p, state, group, low.numel())
        direction = self.adam_of(low, p, state, group, group["eps"], -1.0, seed)
        factor = scaling(direction, low.float(), group["granularity"])
        factor = factor * self.limit(gradient(p), factor, state)
        unbias1, unbias2 = self.unbias(state, group)
        factor.mul_(-keep(group) * group["lr"] * group["scale"] ** 0.5 * unbias2 / unbias1)  # W decays after it moved
        move_rows(p, state, group, seed, lambda part: scaled(gradient(p), factor, part))

    @staticmethod
    def limit(g_OI: Tensor, factor: Tensor, state: dict[str, Any]) -> Tensor:
        """What keeps the norm of the scaled gradient from growing by more than a hundredth; remembers the norm."""
        zero = torch.zeros((), device=g_OI.device)
        norm = sum((scaled(g_OI, factor, part).square_().sum() for part in row_parts(g_OI)), zero).sqrt().view(1)
        growth = norm / (state["norm"] + TINY) if "norm" in state else torch.ones_like(norm)
        limit = GROWTH / growth.clamp_(min=GROWTH)
        state["norm"] = norm * limit
        return limit


def random_basis(p: Tensor, rank: int, seed: int) -> Tensor:
    """Normal numbers / sqrt(rank) in the matrix's dtype: [R, I] if it is tall, else [O, R]."""
    rng = torch.Generator(p.device).manual_seed(seed)
    size = (rank, p.shape[1]) if is_tall(p) else (p.shape[0], rank)
    return torch.randn(size, generator=rng, device=p.device).mul_(rank**-0.5).to(p.dtype)


def scaling(direction: Tensor, low: Tensor, granularity: str) -> Tensor:
    """Norms of Adam's direction over norms of the gradient, both in the subspace: [O, 1], [1, I] or [1, 1]."""
    dim = (0, 1) if granularity == "tensor" else int(is_tall(low))
    norms = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (direction, low))
    return next(norms) / (next(norms) + TINY)


def scaled(g_OI: Tensor, factor: Tensor, part: slice) -> Tensor:
    """Rows of the gradient times their, or their columns', factors; float32."""
    return g_OI[part].to(torch.float32, copy=True).mul_(factor[part] if factor.shape[0] > 1 else factor)
