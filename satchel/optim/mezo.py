"""MeZO: the loss at two points instead of a backward pass; all weights train in the memory of inference.

    rho = (loss(theta + r z) - loss(theta - r z)) / 2 r        z a random direction, drawn from its seed, never kept
    g = mean over `directions` of rho z        theta = (1 - lr * weight_decay) theta - lr * g

`update` says what is done with g: `sgd` as above, `sign` with sign(rho) for rho, `momentum` (heavy ball) and `adam`
with their moments, `conservative` as sgd, but only where that is the best of staying, the step, and the opposite step.
`blocks` measures the parameters in so many parts, one after the other: a less noisy estimate, for two forward passes a
part. `sparsity` leaves a random share of the elements alone, the same one for `resample` steps.

Saves gradients, activations and, but for momentum and adam, optimizer state: the peak is that of an evaluation. The
weights come back from each measurement (`_directions.py`): in float32 but for a rounding error of that, in bfloat16 bit
for bit. It spends quality: the estimate's noise grows with the number of elements, so that it fine-tunes in thousands
of steps what a gradient does in tens, and no planner chooses it. Learning rates are the papers', far below AdamW's;
clipping does not touch it. Elements of bfloat16 smaller than about `radius` stay as they are; rounding=fp32 moves all,
for two bytes each. `conservative` has to take steps back, which wants float32 or rounding=fp32.
Paper: https://arxiv.org/abs/2305.17333; the updates, blocks, sparsity: https://arxiv.org/abs/2402.11592
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from satchel.core.seams import Card
from satchel.optim._directions import descend_, perturb_
from satchel.optim._shared import decay_groups
from satchel.optim._zeroth import Closure, Part, Zeroth, ZerothStepper, consecutive, numbers_of

# K directions


@dataclass(frozen=True, kw_only=True)
class MeZO(Zeroth):
    """Finite differences along random directions."""

    card = Card(
        paper="https://arxiv.org/abs/2305.17333",
        saves=("gradients", "optimizer", "activations"),
        spends=("compute", "quality"),
        fidelity="study",
        claim="fine-tunes OPT-30B on one A100 of 80 GB, within 1% of full tuning on 7 of 11 tasks with OPT-13B",
        demo={"directions": 16},
    )

    update: Literal["sgd", "sign", "conservative", "momentum", "adam"] = "sgd"  # what is done with the estimate
    radius: float = 1e-3  # how far along a direction the loss is measured, above 0
    blocks: int = 1  # parts of the model that are measured one after the other, 1 or more

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.radius > 0, f"radius={self.radius} is not above 0; 1e-3 is usual")
        self.require(self.blocks >= 1, f"blocks={self.blocks} is below 1; the number of layers is usual")

    def updates(self) -> tuple[str, ...]:
        """The updates that the method knows."""
        return (*super().updates(), "conservative")

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"radius": self.radius}

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> MeZOStepper:
        """A torch optimizer whose step wants a closure; see `ZerothStepper`. Raises UserError on a dtype it cannot."""
        narrow = [name for name, p in named_parameters if p.dtype != torch.float32 and self.rounding != "fp32"]
        self.require(
            self.update != "conservative" or not narrow,
            f"update=conservative takes steps back, for which {', '.join(narrow[:1])} in bfloat16 has no bits; "
            "add rounding=fp32",
        )
        groups = decay_groups(named_parameters, self.weight_decay)
        stepper = self.stepper()(groups, lr, seed, **self.stepper_knobs())
        numbers = numbers_of(named_parameters, stepper)
        measured = len(named_parameters) - self.exact([name for name, _ in named_parameters])
        places = consecutive([p.numel() for _, p in named_parameters[:measured]], self.blocks)
        stepper.parts, stepper.top = [[numbers[place] for place in part] for part in places], numbers[measured:]
        return stepper

    def stepper(self) -> type[MeZOStepper]:
        """The torch optimizer of this method."""
        return MeZOStepper

    def exact(self, names: Sequence[str]) -> int:
        """How many parameters at the end have a gradient instead."""
        return 0


class MeZOStepper(ZerothStepper):
    """State as `ZerothStepper`'s."""

    top: Sequence[int] = ()  # numbers of the parameters that have a gradient instead

    def slope(self, part: list[Part], which: int, closure: Closure) -> Tensor:
        """The slope between the two points, by two losses. The parameters are back whatever the closure raises."""
        losses, here = [], 0
        try:
            for place in (1, -1):
                self._go(part, which, here, place)
                here = place
                losses.append(closure())
        finally:
            if here:
                self._go(part, which, here, 0)
        return (losses[0] - losses[1]) / (2 * part[0].group["radius"])

    def slopes(self, part: list[Part], closure: Closure) -> Tensor:
        """What each direction goes into the estimate with."""
        rho_K = super().slopes(part, closure)
        return self._best(part, rho_K, closure) if part[0].group["update"] == "conservative" else rho_K

    def _go(self, part: list[Part], which: int, back: int, forth: int) -> None:
        for each in part:
            torch.autograd.graph.increment_version(each.p)
            perturb_(each.p.detach().view(-1), self.low(each), back, forth, *self.draw(each, which))

    def _best(self, part: list[Part], rho_K: Tensor, closure: Closure) -> Tensor:
        """rho_K if the step is nowhere worse than staying, of which it is 0 times, and than the opposite step, -1."""
        losses, gone = [closure()], 0
        try:
            for place in (1, -1):
                self._try(part, rho_K * (place - gone))
                gone = place
                losses.append(closure())
        finally:
            if gone:
                self._try(part, rho_K * -gone)
        here, there, opposite = losses
        other = torch.where(opposite < here, -1.0, 0.0)
        return rho_K * torch.where((there <= here) & (there <= opposite), 1.0, other)

    def _try(self, part: list[Part], rho_K: Tensor) -> None:
        """Descend without decay, and without a trace in the state."""
        for each in part:
            rates = ("fp32", 0.0, each.group["lr"], 1.0, 0)
            torch.autograd.graph.increment_version(each.p)
            descend_(each.p.detach().view(-1), self.low(each), None, rho_K, *self.draw(each), *rates)
