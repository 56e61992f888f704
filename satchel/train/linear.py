"""A straight line from the peak down to `final`.

    factor = 1 - (1 - final) * progress

Paper: https://arxiv.org/abs/1810.04805
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.train._shared import Falling


@dataclass(frozen=True, kw_only=True)
class Linear(Falling):
    """Warm-up, then a straight fall."""

    card = Card(paper="https://arxiv.org/abs/1810.04805", reference="transformers")

    def after(self, progress: float) -> float:
        """Falls evenly."""
        return 1 - (1 - self.final) * progress
