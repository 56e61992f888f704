"""Warm-up, stable, decay: the peak for most of the run and a straight fall at its end.

    factor = 1 until the last `decay` of the steps, then a line down to `final`

A run can be prolonged from any point of its stable part, without knowing its length beforehand.
Paper: https://arxiv.org/abs/2404.06395
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.train._shared import Falling


@dataclass(frozen=True, kw_only=True)
class WSD(Falling):
    """Warm-up, a plateau, a straight fall."""

    card = Card(
        paper="https://arxiv.org/abs/2404.06395",
        claim="with a tenth of the steps for decay, on par with a cosine of the same length",
    )

    decay: float = 0.1  # share of the steps after warm-up that fall, (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.decay <= 1, f"decay={self.decay} is outside (0, 1]; 0.1 is usual")

    def after(self, progress: float) -> float:
        """The peak, and then an even fall."""
        return 1 - (1 - self.final) * max(0.0, progress - (1 - self.decay)) / self.decay
