"""One byte a weight: symmetric integers with a scale for each row, or for each group of a row.

    W[o, i] = q[o, i] * scale[o, i // group]        q in -127..127, scale = max |W| of the group / 127

Takes O * I + 2 * O * groups bytes: scales are bfloat16, rounded up before the weights are rounded to them. On a CPU the
codes of a model in bfloat16 are multiplied by as they are where groups are multiples of 32, unless there are gradients
(model/tiles.py); else spends compute on unpacking the matrix in every pass. Up to 0.4% of a group's largest weight in
error.
Paper: https://arxiv.org/abs/2208.07339 (the row-wise part; no outlier columns)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.compress._shared import Inner
from satchel.core.seams import Card
from satchel.model.blocks import join_int8
from satchel.model.layout import tiles_made
from satchel.model.packed import Packed, require_groups, round_up_bf16, row_chunks
from satchel.model.tiles import TiledLinear, multiplies

# O outputs, I inputs, G groups of a row, J inputs of a group


class Int8Linear(Packed):
    """A linear map in int8, for torch."""

    q_OI: Tensor
    scale_OG: Tensor

    def __init__(self, weight_OI: Tensor, group: int) -> None:
        """Groups of `group` fill the rows."""
        super().__init__(weight_OI.shape, weight_OI.dtype)
        groups, device = self.in_features // group, weight_OI.device
        self.register_buffer("q_OI", torch.empty(weight_OI.shape, dtype=torch.int8, device=device))
        self.register_buffer("scale_OG", torch.empty(self.out_features, groups, dtype=torch.bfloat16, device=device))
        for rows in row_chunks(weight_OI):
            q_OGJ, self.scale_OG[rows] = quantise(weight_OI[rows], group)
            self.q_OI[rows] = q_OGJ.flatten(1)

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        scale_OG = self.scale_OG[rows].to(out_OI.dtype)
        out_OI.copy_(self.q_OI[rows]).unflatten(1, (scale_OG.shape[1], -1)).mul_(scale_OG.unsqueeze(-1))


def quantise(weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, G, J] in int8 and scales [O, G] in bfloat16."""
    weight_OGJ = weight_OI.float().unflatten(1, (-1, group))
    scale_OG = round_up_bf16(weight_OGJ.abs().amax(-1) / 127)
    return (weight_OGJ / scale_OG.float().unsqueeze(-1)).round_().to(torch.int8), scale_OG


@dataclass(frozen=True, kw_only=True)
class Int8(Inner):
    """Eight-bit weights: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2208.07339",
        saves=("weights",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="models to 175B parameters in 8 bits without loss on zero-shot tasks (with outlier columns in 16 bits)",
    )

    group: int = 0  # weights that share a scale; 0: a whole row

    def __post_init__(self) -> None:
        self.require(self.group >= 0, f"group={self.group} is below 0; 0 is one scale a row, 64 a finer one")

    def pack(self, weight_OI: Tensor) -> nn.Module:
        """A `TiledLinear` where it multiplies, else an `Int8Linear`. Raises ModelError if groups do not fill a row."""
        group = self.group or weight_OI.shape[1]
        require_groups(self.name, weight_OI.shape, group)
        if not multiplies(weight_OI, group):
            return Int8Linear(weight_OI, group)
        tiles = tiles_made(weight_OI, lambda some_OI: join_int8(*quantise(some_OI, group)), f"INT8:{group}")
        outputs, inputs = weight_OI.shape
        return TiledLinear(tiles, f"INT8:{group}", outputs, inputs, weight_OI.dtype)
