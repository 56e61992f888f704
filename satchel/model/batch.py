"""What a decoder is trained on at once: documents laid end to end in one row, without padding.

`targets` are shifted already: `targets[n]` is the token that follows `tokens[n]`, or IGNORE where no loss is taken.

Shapes: N tokens of all documents together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100  # the target of a token without loss


@dataclass(frozen=True)
class Batch:
    """Documents that are run together; none attends to another."""

    tokens_1N: Tensor  # int64
    targets_1N: Tensor  # int64, IGNORE where no loss is taken
    lengths: tuple[int, ...]  # tokens of each document; their sum is N
    count: int  # targets that are not IGNORE
    filler: int = 0  # tokens of the last document, if it is there only to fill up

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(self, tokens_1N=self.tokens_1N.to(device), targets_1N=self.targets_1N.to(device))

    def filled(self) -> Batch:
        """The same batch with a document without targets behind it, which makes it `whole`."""
        filler = whole(self.tokens_1N.shape[1]) - self.tokens_1N.shape[1]
        if not filler:
            return self
        return Batch(
            functional.pad(self.tokens_1N, (0, filler)),
            functional.pad(self.targets_1N, (0, filler), value=IGNORE),
            (*self.lengths, filler),
            self.count,
            filler,
        )


def whole(tokens: int) -> int:
    """The next larger number of tokens that batches have: four to an octave, multiples of 64.

    On a CPU every new number costs the time to make kernels for it, and oneDNN's caches some 20 MB of memory that they
    never give back.
    """
    step = max(64, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step
