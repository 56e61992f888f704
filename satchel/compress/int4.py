"""Half a byte a weight: integers with a scale, and a smallest value, for each group of a row.

    W[o, i] = q[o, i] * scale[o, g] + low[o, g]        q in 0..15, g = i // group
    symmetric: W[o, i] = (q[o, i] - 8) * scale[o, g]

Takes O * I / 2 + 4 * O * I / group bytes (2 * O * I / group if symmetric): scale and low are bfloat16, and the weights
are rounded to what those are. Spends compute on unpacking, and quality: nf4 is nearer to weights that are
normally distributed, this is nearer to those that are skewed.
Paper: https://arxiv.org/abs/2210.17323 (its groupwise grid; rounded to nearest here)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.core.seams import Card, WeightFormat
from satchel.model.packed import Packed, require_groups, round_up_bf16, row_chunks

# O outputs, I inputs, J half of the inputs, G groups of a row


class Int4Linear(Packed):
    """A linear map in groupwise int4. The high nibbles of a row hold its first half, the low ones its second."""

    q_OJ: Tensor
    scale_OG: Tensor
    low_OG: Tensor | None  # None: symmetric

    def __init__(self, weight_OI: Tensor, group: int, symmetric: bool) -> None:
        super().__init__(weight_OI.shape, weight_OI.dtype)
        outputs, inputs = weight_OI.shape
        groups, device = inputs // group, weight_OI.device
        self.register_buffer("q_OJ", torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale_OG", torch.empty(outputs, groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("low_OG", None if symmetric else torch.empty_like(self.scale_OG))
        for rows in row_chunks(weight_OI):
            self._pack(weight_OI[rows].float().unflatten(1, (groups, group)), rows)

    def _pack(self, weight_OGI: Tensor, rows: slice) -> None:
        if self.low_OG is None:
            scale_OG = round_up_bf16(weight_OGI.abs().amax(-1) / 7)
            low_OG = -8 * scale_OG
        else:
            low_OG = weight_OGI.amin(-1).to(torch.bfloat16)
            scale_OG = round_up_bf16((weight_OGI.amax(-1) - low_OG.float()) / 15)
            self.low_OG[rows] = low_OG
        self.scale_OG[rows] = scale_OG
        q_OGI = (weight_OGI - low_OG.float().unsqueeze(-1)) / scale_OG.float().unsqueeze(-1)
        high_OJ, low_OJ = q_OGI.round_().clamp_(0, 15).flatten(1).to(torch.uint8).chunk(2, dim=1)
        self.q_OJ[rows] = high_OJ << 4 | low_OJ

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        q_OJ, scale_OG = self.q_OJ[rows], self.scale_OG[rows].to(out_OI.dtype)
        nibbles_OHJ = torch.stack((q_OJ >> 4, q_OJ & 15), dim=1)
        out_OGI = out_OI.copy_(nibbles_OHJ.flatten(1)).unflatten(1, (scale_OG.shape[1], -1))
        if self.low_OG is None:
            out_OGI.sub_(8).mul_(scale_OG.unsqueeze(-1))
        else:
            out_OGI.mul_(scale_OG.unsqueeze(-1)).add_(self.low_OG[rows].to(out_OI.dtype).unsqueeze(-1))


@dataclass(frozen=True, kw_only=True)
class Int4(WeightFormat):
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
        """An `Int4Linear`. Raises ModelError if the groups do not fill a row."""
        require_groups(self.name, weight_OI, self.group)
        return Int4Linear(weight_OI, self.group, self.symmetric)
