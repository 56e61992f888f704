"""How keys and values lie in the pages of a pool: the parts of which a token's consist, one after the other.

A page of one head has of each part what 16 tokens have: [n, 16] of the keys, [16, n] of the values. The `KV` in the
slot `kv` says what the parts are, makes them of numbers, and numbers of them. Without one there is a single part: the
numbers themselves.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from satchel.core.book import make
from satchel.core.serve_seams import KV

# E head dim, n numbers of a part, P tokens of a page, X numbers of a page and head in the pool's dtype


class AsTheyAre(KV):
    """What stands where the slot is empty."""

    kernel = 0

    def parts(self, dim: int, dtype: torch.dtype) -> tuple[tuple[torch.dtype, int], ...]:
        """One."""
        return ((dtype, dim),)

    def encode(self, x_NKE: Tensor) -> tuple[Tensor, ...]:
        """The same."""
        return (x_NKE,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The same."""
        return parts[0]


@cache
def kv_of(spelling: str) -> KV:
    """What fills the slot `kv`. Raises UserError for a spelling that nothing has."""
    return make("kv", spelling) or AsTheyAre()


def token_bytes(kv: KV, dim: int, dtype: torch.dtype) -> int:
    """Of the keys, or of the values, of one token and head."""
    return sum(part.itemsize * count for part, count in kv.parts(dim, dtype))


def parts_of(kv: KV, data_X: Tensor, dim: int) -> list[Tensor]:
    """The pages of keys, or of values, part by part: views [..., n * P] of [..., X]."""
    each = data_X.shape[-1] * data_X.dtype.itemsize // token_bytes(kv, dim, data_X.dtype)
    parts = kv.parts(dim, data_X.dtype)
    sizes = [part.itemsize * count * each for part, count in parts]
    pieces = data_X.view(torch.uint8).split(sizes, dim=-1)
    return [piece.view(part) for piece, (part, _) in zip(pieces, parts, strict=True)]
