"""Half a cosine from the peak down to `final`: slow, fast, slow.

    factor = final + (1 - final) * (1 + cos(pi * progress)) / 2

Paper: https://arxiv.org/abs/1608.03983
"""

import math
from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.train._shared import Falling


@dataclass(frozen=True, kw_only=True)
class Cosine(Falling):
    """Warm-up, then half a cosine."""

    card = Card(paper="https://arxiv.org/abs/1608.03983", reference="transformers")

    def after(self, progress: float) -> float:
        """Falls as a cosine does."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
