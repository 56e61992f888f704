"""Half a byte a weight: integers with a scale, and a smallest value, for each group of a row.

    W[o, i] = q[o, i] * scale[o, g] + low[o, g]        q in 0..15, g = i // group
    symmetric: W[o, i] = (q[o, i] - 8) * scale[o, g]

Takes O * I / 2 + 4 * O * I / group bytes (2 * O * I / group if symmetric): scale and low are bfloat16, and the weights
are rounded to what those are. On a CPU the codes of a model in bfloat16 are multiplied by as they are where groups are
multiples of 32, unless there are gradients (model/tiles.py); else spends compute on unpacking. Spends quality: nf4 is
nearer to weights that are normally distributed, this is nearer to those that are skewed.
Paper: https://arxiv.org/abs/2210.17323 (its groupwise grid; rounded to nearest here)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.compress._shared import Inner
from satchel.core.seams import Card
from satchel.model.blocks import join_int4
from satchel.model.layout import tiles_made
from satchel.model.packed import Packed, require_groups, round_up_bf16, row_chunks
from satchel.model.tiles import TiledLinear, multiplies

# O outputs, I inputs, H half of the inputs, G groups of a row, J inputs of a group


class Int4Linear(Packed):
    """A linear map in groupwise int4, for torch. High nibbles hold a row's first half, low ones its second."""

    q_OH: Tensor
    scale_OG: Tensor
    low_OG: Tensor | None  # None: symmetric

    def __init__(self, weight_OI: Tensor, group: int, symmetric: bool) -> None:
        """Groups of `group` fill the rows."""
        super().__init__(weight_OI.shape, weight_OI.dtype)
        outputs, inputs = weight_OI.shape
        groups, device = inputs // group, weight_OI.device
        self.register_buffer("q_OH", torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale_OG", torch.empty(outputs, groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("low_OG", None if symmetric else torch.empty_like(self.scale_OG))
        for rows in row_chunks(weight_OI):
            q_OGJ, self.scale_OG[rows], low_OG = quantise(weight_OI[rows], group, symmetric)
            if self.low_OG is not None and low_OG is not None:
                self.low_OG[rows] = low_OG
            first_OH, second_OH = q_OGJ.flatten(1).chunk(2, dim=1)
            self.q_OH[rows] = first_OH << 4 | second_OH

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        q_OH, scale_OG = self.q_OH[rows], self.scale_OG[rows].to(out_OI.dtype)
        halves = torch.stack((q_OH >> 4, q_OH & 15), dim=1)
        out_OGJ = out_OI.copy_(halves.flatten(1)).unflatten(1, (scale_OG.shape[1], -1))
        if self.low_OG is None:
            out_OGJ.sub_(8).mul_(scale_OG.unsqueeze(-1))
        else:
            out_OGJ.mul_(scale_OG.unsqueeze(-1)).add_(self.low_OG[rows].to(out_OI.dtype).unsqueeze(-1))


def quantise(weight_OI: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [O, G, J] in uint8, scales [O, G] and smallest values in bfloat16; those are not needed if symmetric."""
    weight_OGJ = weight_OI.float().unflatten(1, (-1, group))
    if symmetric:
        scale_OG = round_up_bf16(weight_OGJ.abs().amax(-1) / 7)
        low_OG = -8 * scale_OG
    else:
        low_OG = weight_OGJ.amin(-1).to(torch.bfloat16)
        scale_OG = round_up_bf16((weight_OGJ.amax(-1) - low_OG.float()) / 15)
    q_OGJ = (weight_OGJ - low_OG.float().unsqueeze(-1)) / scale_OG.float().unsqueeze(-1)
    return q_OGJ.round_().clamp_(0, 15).to(torch.uint8), scale_OG, None if symmetric else low_OG


@dataclass(frozen=True, kw_only=True)
class Int4(Inner):
    """Groupwise four-bit integers: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2210.17323",
        saves=("weights",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="OPT-175B and BLOOM-176B in 3-4 bits on one GPU with little loss (with GPTQ's correction of the error)",
        demo={"group": 16},
    )

    group: int = 64  # weights that share a scale, even
    symmetric: bool = False  # one number a group instead of two

    def __post_init__(self) -> None:
        even = self.group >= 2 and self.group % 2 == 0
        self.require(even, f"group={self.group} is not an even number above 0; 64 and 128 are usual")

    def pack(self, weight_OI: Tensor) -> nn.Module:
        """A `TiledLinear` where it multiplies, else an `Int4Linear`. Raises ModelError if groups do not fill a row."""
        group, symmetric = self.group, self.symmetric
        require_groups(self.name, weight_OI.shape, group)
        if not multiplies(weight_OI, group):
            return Int4Linear(weight_OI, group, symmetric)
        kind = f"INT4S:{group}" if symmetric else f"INT4:{group}"
        tiles = tiles_made(weight_OI, lambda some_OI: join_int4(*quantise(some_OI, group, symmetric)), kind)
        outputs, inputs = weight_OI.shape
        return TiledLinear(tiles, kind, outputs, inputs, weight_OI.dtype)
