"""Re-warming and re-decaying: from where the last run ended a line up to the peak, then half a cosine down again.

    factor = start + (1 - start) * progress                          over the first `warmup` of the steps
    factor = final + (1 - final) * (1 + cos(pi * progress)) / 2      over the others

For a model whose learning rate had decayed and that is to learn new data. Without re-warming it learns little of them;
with it the losses on old and new data rise first, even on the same data, and the new one ends lower, the old one higher
the higher the peak (`lr`). How long the climb takes hardly matters. Replay (a mixture) keeps the old data.
Paper: https://arxiv.org/abs/2308.04014
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.train.cosine import Cosine


@dataclass(frozen=True, kw_only=True)
class Rewarm(Cosine):
    """A climb that begins above nothing, then half a cosine to above nothing."""

    card = Card(
        paper="https://arxiv.org/abs/2308.04014",
        claim="re-warmed models end below those trained from scratch on the new data, at 410M and 297B tokens",
    )

    warmup: float = 0.01  # share of the steps that climb to the peak, [0, 1)
    final: float = 0.1  # share of the peak that is left at the end, [0, 1]
    start: float = 0.1  # share of the peak that the climb begins from, as the last run's `final`, [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.start <= 1, f"start={self.start} is outside [0, 1]; 0.1 goes on from a tenth")

    def climbing(self, progress: float) -> float:
        """A line from `start`."""
        return self.start + (1 - self.start) * progress
