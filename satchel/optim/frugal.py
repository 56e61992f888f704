"""FRUGAL: AdamW for a share of each matrix's columns, signs of the gradient for the rest.

    every `gap` steps, for W [O, I]: C = density * I columns drawn at random, with moments that start at zero
    W = (1 - lr * weight_decay) W - lr * (Adam(G[:, C]) there, rest * sign(G) elsewhere)

Every element moves at every step, so that updates have full rank; only the columns in C pay for state: 2 density O I
moments, where AdamW keeps 2 O I. density=1 is AdamW, density=0 signSGD without state. `rule=sgd` takes rest * G instead
of its sign. C is drawn again from its seed at every step, which is all that is kept of it. Matrices of blocks are
treated so; embeddings, head, norms and biases take plain AdamW. Fine-tuning wants a `rest` near 0.1.

The authors' code also chooses whole matrices or singular vectors; columns do as well in the paper, and leave each layer
with the same bytes.
Paper: https://arxiv.org/abs/2411.07837
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.optim._adam import AdamStepper
from satchel.optim._landing import low_bits
from satchel.optim._projected import Projected, ProjectedStepper, move_rows
from satchel.optim._shared import few_barriers, gradient, store_name, zero_moments

# O outputs and I inputs of a matrix, C columns with state


@dataclass(frozen=True, kw_only=True)
class Frugal(Projected):
    """Gradient splitting: a part with state, a part without."""

    card = Card(
        paper="https://arxiv.org/abs/2411.07837",
        saves=("optimizer",),
        spends=("quality",),
        fidelity="approx",
        claim="nearly AdamW's perplexity with a quarter of its state, pre-training models of 60M to 1B on C4",
        dial=("density", 0.0, 1.0),
        demo={"density": 0.25, "gap": 10},
    )

    density: float = 0.25  # share of a matrix's columns that have moments, [0, 1]
    gap: int = 200  # steps between two draws of the columns, 1 or more
    rest: float = 1.0  # factor on the learning rate of the other columns, [0, inf)
    rule: Literal["sign", "sgd"] = "sign"  # what moves the other columns

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.density <= 1, f"density={self.density} is outside [0, 1]; 0.25 is usual")
        self.require(self.gap >= 1, f"gap={self.gap} is below 1; 200 is usual")
        self.require(self.rest >= 0, f"rest={self.rest} is below 0; 1 is usual, 0.1 for fine-tuning")
        self.require(self.rule in ("sign", "sgd"), f"no rule '{self.rule}'; there is sign, sgd")

    def stepper(self) -> type[FrugalStepper]:
        """The torch optimizer of this method."""
        return FrugalStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        own = {"density": self.density, "gap": self.gap, "rest": self.rest, "rule": self.rule}
        return super().stepper_knobs() | own


class FrugalStepper(ProjectedStepper):
    """State of a matrix: `columns_seed`, and Adam's moments of the columns that it draws, [O, C] flat."""

    @few_barriers()
    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one matrix, in place."""
        if group["density"] == 1:  # nothing to draw, and so no moments to begin anew
            return AdamStepper.update(self, p, state, group, seed)
        count = round(group["density"] * p.shape[1])
        if state["step"] == 1:
            state.update(low_bits(p, group))
        if self.due(state, group):
            state.update(zero_moments(store_name(group["moments"], p), p.shape[0] * count, p.device), columns_seed=seed)
        columns_C = draw_columns(p.shape[1], count, state["columns_seed"], p.device)
        step_OC = self.active_step(gradient(p).index_select(1, columns_C), p, state, group, seed)
        size = group["lr"] * group["rest"]

        def step_of(part: slice) -> Tensor:
            rest = gradient(p)[part].sign() if group["rule"] == "sign" else gradient(p)[part]
            return rest.to(torch.float32, copy=True).mul_(-size).index_copy_(1, columns_C, step_OC[part])

        move_rows(p, state, group, seed, step_of)

    def active_step(self, low: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor:
        """Adam's step of the columns with state, [O, C] in float32, with bias correction since they were drawn."""
        since = {"step": (state["step"] - 1) % group["gap"] + 1}
        unbias1, unbias2 = self.unbias(since, group)
        return self.adam_of(low, p, state, group, group["eps"] * unbias2, group["lr"] * unbias2 / unbias1, seed)


def draw_columns(width: int, count: int, seed: int, device: torch.device) -> Tensor:
    """`count` different columns of `width`, ascending; any set is as likely."""
    rng = torch.Generator(device).manual_seed(seed)
    return torch.rand(width, generator=rng, device=device).argsort()[:count].sort()[0]
