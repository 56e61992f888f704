"""Keys and values in the pool as codes of 8 bits, with one scale for each token and head.

    scale = bfloat16(max |x| / 127);   code = round(x / scale);   x ~ code * scale

Saves nearly half of what a token takes in bfloat16: E + 2 bytes of 2 E for the keys, or the values, of a head of E
dimensions. Spends their rounding, by 1/253 of the largest at most. What is stored of a token depends on this token
alone, so blocks are shared, copied and moved as ever, and an answer is the same in any company. Fewer bits would need
more: the keys of some models have channels far above the rest, which want scales of their own over many tokens (KIVI),
or a correction of what was lost (GEAR); in 8 bits one scale a token leaves little to correct.
Paper: https://arxiv.org/abs/2402.02750
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from satchel.core.card import Card
from satchel.core.serve_seams import KV

# N tokens, K kv heads, E head dim

TOP = 127
TINY = torch.finfo(torch.float32).tiny  # a scale below it is none


@dataclass(frozen=True, kw_only=True)
class Int8(KV):
    """Codes and scales."""

    card = Card(
        paper="https://arxiv.org/abs/2402.02750",
        saves=("kv", "traffic"),
        spends=("quality",),
        fidelity="approx",
    )
    kernel: ClassVar[int | None] = 1

    def parts(self, dim: int, dtype: torch.dtype) -> tuple[tuple[torch.dtype, int], ...]:
        """Codes, and their scale."""
        return ((torch.int8, dim), (torch.bfloat16, 1))

    def encode(self, x_NKE: Tensor) -> tuple[Tensor, ...]:
        """As native/pages.h does; what is no number makes the token's scale none, and its codes 0."""
        x_NKE = x_NKE.float()
        scale_NK1 = (x_NKE.abs().amax(-1, keepdim=True) * (1 / TOP)).bfloat16()
        scale_NK1 = scale_NK1.masked_fill(scale_NK1 < TINY, 0.0)
        sound_NK1 = (scale_NK1 > 0) & scale_NK1.isfinite()
        code_NKE = torch.where(sound_NK1, x_NKE / scale_NK1.float(), 0.0).round()
        return code_NKE.to(torch.int8), scale_NK1

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Numbers again."""
        codes, scale = parts
        return (codes * scale.float()).to(dtype)
