"""Weights in the bits in which their file holds them: nothing is unpacked but in the registers that multiply.

    W[o, i] = scale[o, m] * q[o, i] (+ offset[o, m])      GGUF's Q4_0, Q4_1, Q8_0, Q4_K as they are, m = i // 32
    W[o, i] = bfloat16                                    a model in 16 bits, its very numbers

Blocks of other kinds become Q8_0, as does a model in float32: 34 bytes for 32 weights, up to 0.4% of a block's largest
weight in error. Takes what the file takes. Spends compute on unpacking, far less of it where native/linear.cpp runs,
and, with blocks, 8 bits of precision in what multiplies few rows. Embeddings and head are packed as well unless
something trains.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.core.seams import Card, WeightFormat
from satchel.model.layout import tiles_of, tiles_of_numbers, tiles_q8
from satchel.model.packed import require_groups
from satchel.model.tiles import TiledEmbedding, TiledLinear, exact
from satchel.native.levels import supported
from satchel.native.linear import FILES, GROUP

# O outputs, I inputs, B bytes of a row


@dataclass(frozen=True, kw_only=True)
class Stored(WeightFormat):
    """A file's own bits: see the file's docstring."""

    card = Card(
        paper="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
        saves=("weights",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="a model runs from the file's own 4 or 8 bits a weight",
    )
    keeps = True

    level: str = "auto"  # instructions to use: auto, amx, avx512, avxvnni, avx2 or portable

    def __post_init__(self) -> None:
        levels = ", ".join(("auto", *supported()))
        self.require(
            self.level in levels.split(", "), f"level={self.level!r} is none that this processor has: {levels}"
        )

    def pack(self, weight_OI: Tensor) -> nn.Module:
        """A `TiledLinear` of the numbers in 16 bits, or in Q8_0. Raises ModelError if 32 do not fill a row."""
        require_groups(self.name, weight_OI.shape, GROUP)
        if weight_OI.dtype == torch.bfloat16:
            return exact(weight_OI, self.level)
        outputs, inputs = weight_OI.shape
        return TiledLinear(tiles_of_numbers(weight_OI), "Q8_0", outputs, inputs, weight_OI.dtype, self.level)

    def pack_outer(self, weight_VD: Tensor) -> nn.Module:
        """As `pack`."""
        return self.pack(weight_VD)

    def keep(self, raw_OB: Tensor, kind: str, inputs: int, dtype: torch.dtype) -> nn.Module:
        """A `TiledLinear` over the file's bits, or over Q8_0 blocks made of them. Raises ModelError as `pack`."""
        require_groups(self.name, (len(raw_OB), inputs), GROUP)
        tiles, kind = (tiles_of(raw_OB, kind), kind) if kind in FILES else (tiles_q8(raw_OB, kind), "Q8_0")
        return TiledLinear(tiles, kind, len(raw_OB), inputs, dtype, self.level)

    def embed(self, packed: nn.Module) -> nn.Module:
        """A `TiledEmbedding`."""
        assert isinstance(packed, TiledLinear)
        return TiledEmbedding(packed)
