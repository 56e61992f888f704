"""One byte a weight: symmetric integers with a scale for each row, or for each group of a row.

    W[o, i] = q[o, i] * scale[o, i // group]        q in -127..127, scale = max |W| of the group / 127

Takes O * I + 2 * O * groups bytes: scales are bfloat16, rounded up before the weights are rounded to them. Spends
compute on unpacking the matrix in every forward and backward pass, and up to 0.4% of a group's largest weight in error.
Paper: https://arxiv.org/abs/2208.07339 (the row-wise part; no outlier columns)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.core.seams import Card, WeightFormat
from satchel.model.packed import Packed, require_groups, round_up_bf16, row_chunks

# O outputs, I inputs, G groups of a row


class Int8Linear(Packed):
    """A linear map in int8."""

    q_OI: Tensor
    scale_OG: Tensor

    def __init__(self, weight_OI: Tensor, group: int) -> None:
        super().__init__(weight_OI.shape, weight_OI.dtype)
        groups = self.in_features // group
        device = weight_OI.device
        self.register_buffer("q_OI", torch.empty(weight_OI.shape, dtype=torch.int8, device=device))
        self.register_buffer("scale_OG", torch.empty(self.out_features, groups, dtype=torch.bfloat16, device=device))
        for rows in row_chunks(weight_OI):
            self._pack(weight_OI[rows].float().unflatten(1, (groups, group)), rows)

    def _pack(self, weight_OGI: Tensor, rows: slice) -> None:
        scale_OG = round_up_bf16(weight_OGI.abs().amax(-1) / 127)
        q_OGI = (weight_OGI / scale_OG.float().unsqueeze(-1)).round_()
        self.q_OI[rows] = q_OGI.flatten(1).to(torch.int8)
        self.scale_OG[rows] = scale_OG

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        scale_OG = self.scale_OG[rows].to(out_OI.dtype)
        out_OI.copy_(self.q_OI[rows]).unflatten(1, (scale_OG.shape[1], -1)).mul_(scale_OG.unsqueeze(-1))


@dataclass(frozen=True, kw_only=True)
class Int8(WeightFormat):
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
        """An `Int8Linear`. Raises ModelError if the groups do not fill a row."""
        group = self.group or weight_OI.shape[1]
        require_groups(self.name, weight_OI, group)
        return Int8Linear(weight_OI, group)
