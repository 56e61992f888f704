"""A schedule without an end: warm-up, cool-down to a constant, and annealing only when a checkpoint is wanted.

    cooldown  t in [0, 1]:  constant + (1 - constant) * (1 + cos(pi * t)) / 2             shape=cosine
                            1 + (constant - 1) * h(t) / h(1),  h(t) = 1 / sqrt(1 + bend * t) - 1   shape=sqrt
    then                    constant
    anneal    t in [0, 1]:  constant * (final / constant) ** t

At the constant a run can go on with whatever data come next, without re-warming: the next one says
`infinite:warmup=0,cooldown=0`, and whichever is to give the model to use adds `anneal=0.15`. The shares are of the run
at hand: of the steps after its warm-up.
Paper: https://arxiv.org/abs/2403.08763
"""

import math
from dataclasses import dataclass
from typing import Literal

from satchel.core.seams import Card
from satchel.train._shared import Warmed


@dataclass(frozen=True, kw_only=True)
class Infinite(Warmed):
    """Warm-up, cool-down, a constant, and a fall when asked."""

    card = Card(
        paper="https://arxiv.org/abs/2403.08763",
        claim="once annealed on par with a cosine of the same length, and no spike where the data change, at 405M",
        demo={"anneal": 0.15},
    )

    warmup: float = 0.01  # share of the steps that climb to the peak, [0, 1)
    cooldown: float = 0.6  # share of the steps after warm-up that fall to the constant, [0, 1]
    constant: float = 0.55  # share of the peak that stays, (0, 1]
    anneal: float = 0.0  # share of the steps at the end that fall to `final`, [0, 1]; 0: the run can be gone on with
    final: float = 0.1  # share of the peak that annealing ends at, (0, 1]
    shape: Literal["cosine", "sqrt"] = "cosine"  # of the cool-down: half a cosine, or an inverse square root
    bend: float = 10.0  # how much of the square root's fall lies at its start, (0, inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.constant <= 1, f"constant={self.constant} is outside (0, 1]; 0.55 is usual")
        self.require(0 < self.final <= self.constant, f"final={self.final} is outside (0, constant]; 0.1 is usual")
        self.require(self.bend > 0, f"bend={self.bend} is not above 0; 10 is usual")
        shares = self.cooldown, self.anneal
        self.require(min(shares) >= 0, f"cooldown={self.cooldown}, anneal={self.anneal}: a share is not below 0")
        self.require(sum(shares) <= 1, f"cooldown={self.cooldown} and anneal={self.anneal} are more than all steps")

    def after(self, progress: float) -> float:
        """Cool-down, constant, annealing."""
        left = progress - (1 - self.anneal)
        if self.anneal and left > 0:
            return self.constant * (self.final / self.constant) ** (left / self.anneal)
        return self._cooled(progress / self.cooldown) if progress < self.cooldown else self.constant

    def _cooled(self, t: float) -> float:
        if self.shape == "cosine":
            return self.constant + (1 - self.constant) * (1 + math.cos(math.pi * t)) / 2
        return 1 + (self.constant - 1) * self._fallen(t) / self._fallen(1.0)

    def _fallen(self, t: float) -> float:
        return 1 / math.sqrt(1 + self.bend * t) - 1
