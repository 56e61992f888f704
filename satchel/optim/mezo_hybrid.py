"""MeZO below, AdamW on top: the last blocks get gradients, all below them a zeroth-order estimate.

    theta_top = AdamW(d loss / d theta_top)        theta_rest = theta_rest - lr * scale * mean of rho z

A step moves the rest as MeZO does, and takes the gradient there. The backward pass ends where the last blocks begin:
nothing below keeps activations. What comes behind the blocks, norm and head, is of the top; a head that is tied to the
embedding lies below. beta1, beta2 and eps are AdamW's too.

Saves gradients, optimizer state and activations of all but the top; spends MeZO's forward passes beside those of AdamW.
The top learns as fast as ever, what the rest adds is as noisy as MeZO. The job's learning rate is AdamW's; `scale`
makes MeZO's of it: 0.01 for sgd on all weights; 0.1 would suit adapters.
Paper: https://arxiv.org/abs/2402.11592
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.optim._zeroth import RATES, Closure, Part
from satchel.optim.mezo import MeZO, MeZOStepper

BLOCK = re.compile(r"^(?:.*?\.)?\d+\.")  # path of a numbered block
USUAL = 1e-4  # AdamW's learning rate for all weights


@dataclass(frozen=True, kw_only=True)
class MeZOHybrid(MeZO):
    """First order on the last blocks, zeroth order on all else."""

    card = Card(
        paper="https://arxiv.org/abs/2402.11592",
        saves=("gradients", "optimizer", "activations"),
        spends=("compute", "quality"),
        fidelity="study",
        claim="with OPT-1.3B on SST-2, first order on a third of the blocks is within 1% of it on all",
        demo={"last": 1, "directions": 4},
    )

    last: int = 2  # blocks at the end that get gradients, 0 or more; 0: what comes behind them only
    scale: float = 0.0  # zeroth-order learning rate over the job's, [0, inf); 0 is what suits all weights

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.last >= 0, f"last={self.last} is below 0; 2 blocks are usual")
        self.require(
            self.scale >= 0, f"scale={self.scale} is below 0; 0 takes what suits all weights; adapters ten times that"
        )

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """AdamW's."""
        return adamw

    def layer_kind(self, layer: int, layers: int) -> Hashable:
        """Each of the last blocks by itself."""
        return max(layer - (layers - self.last) + 1, 0)

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"scale": self.scale or RATES[self.update] / USUAL}

    def stepper(self) -> type[HybridStepper]:
        """The torch optimizer of this method, whose closure calls backward where grad mode is on."""
        return HybridStepper

    def exact(self, names: Sequence[str]) -> int:
        """How many parameters are of the top. Raises UserError if that leaves none for one of the two ways."""
        count = len(names) - first_of_top(names, self.last)
        self.require(count < len(names), f"last={self.last} leaves nothing below; take fewer blocks, or adamw")
        self.require(count > 0, f"last={self.last} leaves nothing on top; take more blocks, or mezo")
        return count


def first_of_top(names: Sequence[str], last: int) -> int:
    """The place of the first parameter of the last blocks and what comes behind them; 0 if there are not so many."""
    paths = [found.group() if (found := BLOCK.match(name)) else "" for name in names]
    blocks = list(dict.fromkeys(filter(None, paths)))
    if last == 0:
        return 1 + max((place for place, path in enumerate(paths) if path), default=-1)
    return paths.index(blocks[-last]) if last <= len(blocks) else 0


class HybridStepper(MeZOStepper):
    """State as `ZerothStepper`'s below, and as AdamW's on top."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:
        """One optimizer step; the loss at which the gradient was taken. Raises UserError without a closure."""
        super().step(closure)
        assert closure is not None
        index = self.index()
        loss = self._with_gradients(closure, [index[number][1] for part in self.parts for number in part])
        for number in self.top:
            self.update_one(number, *index[number])
        return loss

    def descend(self, part: list[Part], closure: Closure) -> None:
        """Measure the slopes of some parameters, and move these, at their own learning rate."""
        slower = [each._replace(group=each.group | {"lr": each.group["lr"] * each.group["scale"]}) for each in part]
        super().descend(slower, closure)

    def _with_gradients(self, closure: Closure, below: Sequence[Tensor]) -> Tensor:
        """The loss, with a gradient of all but these: the graph ends where they do."""
        for p in below:
            p.requires_grad_(False)
        try:
            with torch.enable_grad():
                return closure()
        finally:
            for p in below:
                p.requires_grad_(True)
