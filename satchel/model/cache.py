"""Keys and values of the tokens so far, one pair of buffers a layer, grown in steps.

    c = Cache(config, dtype, device);  logits = decoder(prompt, cache=c);  logits = decoder(next_token, cache=c)

Costs 2 x layers x kv_heads x head_dim numbers a token. Layers with a sliding window keep everything too.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from satchel.model.attend import attend
from satchel.model.config import ModelConfig

# B batch, H query heads, K kv heads, S cached tokens, T new tokens, E head dim

STEP = 256  # tokens by which a buffer grows at least


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


class LayerCache:
    """The past of one layer, [B, K, capacity, E] each for keys and values; allocated by the first append."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self._k is None else self._k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(t.nbytes for t in (self._k, self._v) if t is not None)

    def attend(
        self,
        q_BTHE: Tensor,
        k_BTKE: Tensor,
        v_BTKE: Tensor,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> Tensor:
        """Adds T tokens, and attends from these to all so far: [B, T, H, E]."""
        return attend(q_BTHE, *self.append(k_BTKE, v_BTKE), scale=scale, window=window, cap=cap)

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens and gives all keys and all values so far, each [B, S, K, E], as views of the buffers."""
        start, self.length = self.length, self.length + k_BTKE.shape[1]
        self._k, self._v = (self._store(buffer, new, start) for buffer, new in ((self._k, k_BTKE), (self._v, v_BTKE)))
        return tuple(b[:, :, : self.length].transpose(1, 2) for b in (self._k, self._v))  # type: ignore[return-value]

    def _store(self, buffer: Tensor | None, new_BTKE: Tensor, start: int) -> Tensor:
        if buffer is None or buffer.shape[2] < self.length:
            buffer = self._grow(buffer, new_BTKE, start)
        buffer[:, :, start : self.length] = new_BTKE.transpose(1, 2)
        return buffer

    def _grow(self, old: Tensor | None, new_BTKE: Tensor, start: int) -> Tensor:
        batch, _, heads, dim = new_BTKE.shape
        capacity = -(-max(self.length, start * 3 // 2) // STEP) * STEP
        buffer = torch.empty(batch, heads, capacity, dim, dtype=self.dtype, device=self.device or new_BTKE.device)
        if old is not None:
            buffer[:, :, :start] = old[:, :, :start]
        return buffer

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens; the bytes stay for reuse."""
        self.length = min(length, self.length)


class Cache:
    """The past of a whole model. `decoder(tokens, cache=...)` reads and extends it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        self.layers = [LayerCache(dtype, device) for _ in range(config.layers)]

    @property
    def length(self) -> int:
        """Tokens in the past."""
        return self.layers[-1].length

    def positions(self, tokens_BT: Tensor) -> tuple[Tensor, int]:
        """Where T new tokens stand, and how long the sequences become with them."""
        stop = self.length + tokens_BT.shape[1]
        return torch.arange(self.length, stop, device=tokens_BT.device), stop

    @property
    def nbytes(self) -> int:
        """Bytes held over all layers, used or not."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        for layer in self.layers:
            layer.truncate(length)
