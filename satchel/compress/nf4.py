"""Half a byte a weight: sixteen values that lie as normally distributed weights do, scaled by each block's largest.

    W[o, i] = code[q[o, i]] * absmax[block]        blocks of `block` weights along the rows
    double: absmax = code8[a[block]] * absmax8[block // 256] + mean(absmax)

Takes O * I / 2 + 4 * O * I / block bytes; double quantisation makes that O * I / 2 + O * I / block and 4 more for each
256 blocks. Spends compute on unpacking the matrix in every forward and backward pass, and quality.
Paper: https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.compress._shared import Inner
from satchel.core.seams import Card
from satchel.model.packed import Packed, require_groups, row_chunks

# O outputs, I inputs, J half of the inputs, M blocks of a row, K blocks of the matrix, Z blocks of blocks

CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
SUPER = 256  # blocks that share the scale of their absmax


class Nf4Linear(Packed):
    """A linear map in nf4. The high nibble of a byte holds the first of two neighbours of a row."""

    q_OJ: Tensor
    code_16: Tensor
    absmax_OM: Tensor  # unless doubly quantised, else:
    a_K: Tensor
    absmax8_Z: Tensor
    mean: Tensor
    code_256: Tensor

    def __init__(self, weight_OI: Tensor, block: int, double: bool) -> None:
        super().__init__(weight_OI.shape, weight_OI.dtype)
        outputs, inputs = weight_OI.shape
        device, self.blocks = weight_OI.device, inputs // block
        self.register_buffer("q_OJ", torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device))
        self.register_buffer("code_16", torch.tensor(CODE, device=device), persistent=False)
        absmax_OM = torch.empty(outputs, self.blocks, device=device)
        for rows in row_chunks(weight_OI):
            self._pack(weight_OI[rows].float().unflatten(1, (self.blocks, block)), absmax_OM, rows)
        self._store(absmax_OM, double)

    def _pack(self, weight_OMI: Tensor, absmax_OM: Tensor, rows: slice) -> None:
        absmax_OM[rows] = weight_OMI.abs().amax(-1)
        share_OMI = weight_OMI * (1 / absmax_OM[rows].clamp_min(1e-38)).unsqueeze(-1)
        q_OI = torch.zeros(share_OMI.shape, dtype=torch.uint8, device=share_OMI.device)
        for middle in ((self.code_16[1:] + self.code_16[:-1]) / 2).unbind():
            q_OI.add_((share_OMI > middle).view(torch.uint8))  # 2.6 times as fast as bucketize
        q_OI = q_OI.flatten(1)
        self.q_OJ[rows] = q_OI[:, ::2] << 4 | q_OI[:, 1::2]

    def _store(self, absmax_OM: Tensor, double: bool) -> None:
        self.twice = double
        if not double:
            return self.register_buffer("absmax_OM", absmax_OM)
        code_256 = dynamic_code().to(absmax_OM.device)
        mean = absmax_OM.mean()
        rest_ZS = nn.functional.pad((absmax_OM - mean).flatten(), (0, -absmax_OM.numel() % SUPER)).view(-1, SUPER)
        absmax8_Z = rest_ZS.abs().amax(-1)
        share_ZS = rest_ZS * (1 / absmax8_Z.clamp_min(1e-38)).unsqueeze(-1)
        a_ZS = torch.bucketize(share_ZS, (code_256[1:] + code_256[:-1]) / 2, out_int32=True)
        self.register_buffer("a_K", a_ZS.flatten()[: absmax_OM.numel()].to(torch.uint8))
        self.register_buffer("absmax8_Z", absmax8_Z)
        self.register_buffer("mean", mean)
        self.register_buffer("code_256", code_256, persistent=False)

    def absmax(self, rows: slice) -> Tensor:
        """The largest weight of each block of the rows, [O, M] in float32."""
        if not self.twice:
            return self.absmax_OM[rows]
        start, stop = rows.start * self.blocks, rows.stop * self.blocks
        scale_Z = self.absmax8_Z[start // SUPER : -(-stop // SUPER)]
        scale_K = scale_Z.unsqueeze(1).expand(-1, SUPER).flatten()[start % SUPER :][: stop - start]
        absmax_K = self.code_256.index_select(0, self.a_K[start:stop].to(torch.int32))
        return absmax_K.mul_(scale_K).add_(self.mean).view(-1, self.blocks)

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        exact_OI = out_OI if out_OI.dtype == torch.float32 else torch.empty_like(out_OI, dtype=torch.float32)
        pairs_256 = torch.stack((self.code_16.repeat_interleave(16), self.code_16.repeat(16)), dim=1).view(torch.int64)
        q_K = self.q_OJ[rows].flatten().to(torch.int32)
        torch.index_select(pairs_256.flatten(), 0, q_K, out=exact_OI.view(torch.int64).flatten())  # two a lookup
        exact_OI.unflatten(1, (self.blocks, -1)).mul_(self.absmax(rows).unsqueeze(-1))
        if exact_OI is not out_OI:
            out_OI.copy_(exact_OI)


def dynamic_code() -> Tensor:
    """The 8-bit code of Dettmers et al. (https://arxiv.org/abs/2110.02861), [256] in float32, rising from -1 to 1.

    Seven decades, each with twice as many steps as the one below it.
    """
    edges = (torch.linspace(0.1, 1, 2**decade + 1) for decade in range(7))
    steps = [10.0 ** (decade - 6) * (edge[:-1] + edge[1:]) / 2 for decade, edge in enumerate(edges)]
    positive = torch.cat(steps)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values


@dataclass(frozen=True, kw_only=True)
class Nf4(Inner):
    """Four-bit NormalFloat: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2305.14314",
        saves=("weights",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="QLoRA: a 65B model tuned on one 48 GB GPU at the quality of 16-bit tuning",
        reference="bitsandbytes",
        demo={"block": 16},
    )

    block: int = 64  # weights that share a scale, even
    double: bool = True  # the blocks' scales are stored in 8 bits

    def __post_init__(self) -> None:
        even = self.block >= 2 and self.block % 2 == 0
        self.require(even, f"block={self.block} is not an even number above 0; 64 is usual")

    def pack(self, weight_OI: Tensor) -> nn.Module:
        """An `Nf4Linear`. Raises ModelError if the blocks do not fill a row."""
        require_groups(self.name, weight_OI.shape, self.block)
        return Nf4Linear(weight_OI, self.block, self.double)
