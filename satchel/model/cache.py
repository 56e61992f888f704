"""What came before the tokens of a call, as a decoder sees it: something that stores keys and values and attends.

`model/paged.py` is one: keys and values of many sequences in pages of one pool.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

# B batch, T new tokens, H query heads, K kv heads, E head dim


class LayerPast(Protocol):
    """The past of one layer."""

    def attend(
        self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, /, *, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """Adds the keys and values of T tokens, and attends from these to all that they may see: [B, T, H, E]."""
        ...


class Past(Protocol):
    """What came before the tokens of a call; `decoder(tokens, cache=...)` reads and extends it."""

    @property
    def layers(self) -> Sequence[LayerPast]:
        """One a layer."""
        ...

    def positions(self, tokens_BT: Tensor) -> tuple[Tensor, int]:
        """The positions of new tokens, and a length that no sequence among them exceeds."""
        ...
