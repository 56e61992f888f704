"""What a decoder is trained on at once: documents laid end to end in one row, without padding.

`targets` are shifted already: `targets[n]` is the token that follows `tokens[n]`, or IGNORE where no loss is taken.

Shapes: N tokens of all documents together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # the target of a token without loss


@dataclass(frozen=True)
class Batch:
    """Documents that are run together; none attends to another."""

    tokens_1N: Tensor  # int64
    targets_1N: Tensor  # int64, IGNORE where no loss is taken
    lengths: tuple[int, ...]  # tokens of each document; their sum is N
    count: int  # targets that are not IGNORE

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(self.tokens_1N.to(device), self.targets_1N.to(device), self.lengths, self.count)
