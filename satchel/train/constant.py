"""The peak learning rate throughout, after an optional warm-up.

    factor = 1

Paper: https://arxiv.org/abs/1706.02677 (gradual warm-up)
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.train._shared import Warmed


@dataclass(frozen=True, kw_only=True)
class Constant(Warmed):
    """Warm-up, then the peak."""

    card = Card(paper="https://arxiv.org/abs/1706.02677")

    def after(self, progress: float) -> float:
        """Always 1."""
        return 1.0
