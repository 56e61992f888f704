"""Keep the activations of a share of the blocks, and run the others again in the backward pass.

    block i of n is kept if floor((i + 1) * keep) > floor(i * keep)

Between `none` (keep=1) and `full` (keep=0): each kept block costs its activations and saves its second forward pass.
Kept blocks are spread evenly. Exact.
Paper: https://arxiv.org/abs/2205.05198 (which blocks run again, section 5)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from satchel.core.seams import Activations, Card
from satchel.train._recompute import recomputed


@dataclass(frozen=True, kw_only=True)
class Selective(Activations):
    """Some blocks are run again."""

    card = Card(
        paper="https://arxiv.org/abs/2205.05198",
        saves=("activations",),
        spends=("compute",),
        fidelity="exact",
        claim="with sequence parallelism, a fifth of the activations and over 90% less recomputation time",
        dial=("keep", 0.0, 1.0),
        reference="torch",
    )

    keep: float = 0.5  # share of the blocks whose activations are kept, [0, 1]

    def __post_init__(self) -> None:
        self.require(0 <= self.keep <= 1, f"keep={self.keep} is outside [0, 1]; 0.5 keeps every other block")

    def wrap(self, block: Callable[..., Tensor], index: int, depth: int) -> Callable[..., Tensor]:
        """The block itself if it is among those that are kept."""
        kept = math.floor((index + 1) * self.keep) > math.floor(index * self.keep)
        return block if kept else recomputed(block)
