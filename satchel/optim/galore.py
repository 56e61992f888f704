"""GaLore: Adam in a low-dimensional subspace of each matrix's gradient.

    every `gap` steps, for W [O, I] with O >= I: Q [R, I] = the top R right singular vectors of the gradient G
    L = G Q^T [O, R];   D = Adam(L);   W = (1 - lr * weight_decay) (W - lr * scale * D Q)

and mirrored, from the left, where O < I. The moments live on L and go on when Q changes. Matrices of blocks whose
smaller side is above `rank` are projected; embeddings, head, norms and biases take plain Adam.

State is 2 R max(O, I) moments and R min(O, I) for Q, where Adam takes 2 O I. It spends two products with Q a step and
finding Q. `subspace=random` finds it by a randomized range finder with power iterations (Halko et al.), which
catches the gradient's energy within 1% of the exact SVD in a fraction of its time. W holds the full rank throughout.
Paper: https://arxiv.org/abs/2403.03507; range finder: https://arxiv.org/abs/0909.4061
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from satchel.core.seams import Card
from satchel.optim._landing import keep
from satchel.optim._projected import LowRank, ProjectedStepper, move_rows
from satchel.optim._projector import find_basis, is_tall, lower, raised
from satchel.optim._shared import few_barriers, gradient


@dataclass(frozen=True, kw_only=True)
class GaLore(LowRank):
    """Gradient low-rank projection around Adam."""

    card = Card(
        paper="https://arxiv.org/abs/2403.03507",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="65.5% less optimizer state at a perplexity close to full rank, pre-training models up to 7B",
        dial=("rank", 4, 1024),
        reference="galore-torch",
        demo={"rank": 4, "gap": 10},
    )

    scale: float = 0.25  # factor on the projected matrices' learning rate, above 0
    subspace: Literal["random", "exact"] = "random"  # randomized range finder, or SVD

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.scale > 0, f"scale={self.scale} is not above 0; 0.25 is usual")
        self.require(self.subspace in ("random", "exact"), f"no subspace '{self.subspace}'; there is random, exact")

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """AdamW's once `scale` is applied; with the authors' scale that is four times AdamW's, as they have it."""
        return adamw / self.scale

    def stepper(self) -> type[GaLoreStepper]:
        """The torch optimizer of this method."""
        return GaLoreStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"scale": self.scale, "subspace": self.subspace}


class GaLoreStepper(ProjectedStepper):
    """State of a projected matrix beside Adam's on L: `basis`, Q [R, I], or its mirror image [O, R]."""

    @few_barriers()
    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one matrix, in place."""
        tall = is_tall(p)
        if self.due(state, group):
            state["basis"] = find_basis(gradient(p), group["rank"], group["subspace"], seed)
        basis = state["basis"]
        step = self.low_step(lower(gradient(p), basis), p, state, group, seed).to(p.dtype)
        move_rows(p, state, group, seed, lambda part: raised(step, basis, tall, part))

    def low_step(self, low: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor:
        """What the projected gradient moves the decayed matrix by, in the subspace, float32."""
        self.start(p, state, group, low.numel())
        unbias1, unbias2 = self.unbias(state, group)
        size = keep(group) * group["lr"] * group["scale"] * unbias2 / unbias1  # W is decayed after it has moved
        return self.adam_of(low, p, state, group, group["eps"], size, seed)
