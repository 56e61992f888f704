"""What the optimizers share that treat the matrices of blocks apart and leave the rest to AdamW: their knobs, and a
stepper whose update of a whole matrix lands row by row, so that it is never all there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from satchel.optim._adam import Adam, AdamStepper
from satchel.optim._landing import keep, low_bits
from satchel.optim._projector import in_block, row_parts
from satchel.optim._shared import STORES, adam_, decay_groups, move_, store_name, zero_moments

MOMENTS = ("follow", *STORES)


@dataclass(frozen=True, kw_only=True)
class Projected(Adam):
    """A method that has its own way with the matrices of blocks; embeddings, head, norms and biases take AdamW."""

    moments: Literal["follow", "fp32", "bf16", "8bit"] = "follow"  # storage of moments; follow: the parameter's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.moments in MOMENTS, f"no moments '{self.moments}'; there is {', '.join(MOMENTS)}")

    def projects(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is a matrix that the method treats in its own way."""
        return in_block(name, p)

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> ProjectedStepper:
        """A torch optimizer over the parameters. Raises UserError if there is no matrix for the method."""
        groups = projected_groups(named_parameters, self.projects, self.weight_decay)
        sides = [min(p.shape) for name, p in named_parameters if in_block(name, p)]
        self.require(any(group["projected"] for group in groups), self.without_matrix(max(sides, default=0)))
        return self.within(self.stepper())(groups, lr, seed, **self.stepper_knobs())

    def without_matrix(self, side: int) -> str:
        """The complaint if nothing is projected; `side` is the largest smaller side of a block's matrix, or 0."""
        return "no parameter is a matrix of an attention or feed-forward block; take adamw"

    @abstractmethod
    def stepper(self) -> type[ProjectedStepper]:
        """The torch optimizer of this method."""


@dataclass(frozen=True, kw_only=True)
class LowRank(Projected):
    """A method that keeps moments in a subspace of each matrix's gradient."""

    rank: int = 128  # dimensions of the subspace, 1 or more
    gap: int = 200  # steps between two subspaces, 1 or more

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank >= 1, f"rank={self.rank} is below 1; a quarter of the model's width is usual")
        self.require(self.gap >= 1, f"gap={self.gap} is below 1; 200 is usual")

    def projects(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is a matrix of a block that is larger than the subspace on both sides."""
        return in_block(name, p) and min(p.shape) > self.rank

    def without_matrix(self, side: int) -> str:
        """The complaint if nothing is projected."""
        return f"rank={self.rank} leaves no matrix to project; choose one below {side}"

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"rank": self.rank, "gap": self.gap}


def projected_groups(
    named_parameters: Sequence[tuple[str, nn.Parameter]], projects: Callable[[str, Tensor], bool], weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of `decay_groups`, apart for matrices that are `projected` and for what is not."""
    parts = {True: [], False: []}
    for name, p in named_parameters:
        parts[projects(name, p)].append((name, p))
    return [g | {"projected": flag} for flag, named in parts.items() for g in decay_groups(named, weight_decay)]


class ProjectedStepper(AdamStepper):
    """Adam; in the groups that are `projected`, whatever `update_matrix` does."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one parameter, in place."""
        (self.update_matrix if group["projected"] else super().update)(p, state, group, seed)

    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one projected matrix, in place."""
        raise NotImplementedError

    def start(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], moments: int) -> None:
        """At a matrix's first step, its fresh state with `moments` elements a moment."""
        if state["step"] == 1:
            state.update(zero_moments(store_name(group["moments"], p), moments, p.device), **low_bits(p, group))

    def adam_of(
        self, low: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], eps: float, size: float, seed: int
    ) -> Tensor:
        """-size * m / (sqrt(v) + eps) of the moments that stand for a matrix, once moved towards `low`; float32."""
        step = torch.zeros(low.shape, dtype=torch.float32, device=p.device)
        store, betas = store_name(group["moments"], p), (group["beta1"], group["beta2"])
        adam_(step.view(-1), low.view(-1), self.held(state), store, "nearest", *betas, eps, size, 1.0, seed)
        return step

    @staticmethod
    def due(state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Whether this is a step that looks for a new subspace."""
        return (state["step"] - 1) % group["gap"] == 0


def move_rows(
    p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int, step_of: Callable[[slice], Tensor]
) -> None:
    """p = keep * p + step, part by part of its rows; `step_of` gives the step of a part of them."""
    flat, low, width = p.detach().view(-1), state.get("low"), p.shape[1]
    for number, part in enumerate(row_parts(p)):
        cut = slice(part.start * width, part.stop * width)
        bits = None if low is None else low[cut]
        move_(flat[cut], step_of(part).reshape(-1), bits, group["rounding"], keep(group), seed + number)
