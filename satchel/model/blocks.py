"""Rows of a matrix as blocks: the numbers in them, and blocks made of numbers.

Blocks of GGUF's kinds are as the file has them (model/encodings.py). Those of our own kinds, of any size that is a
multiple of 32, begin with numbers in bfloat16, and hold

    INT8     scale, q              W = scale * q               q signed, a byte each
    INT4S    scale, q              W = scale * (q - 8)         q in 0..15; of each 32, byte i has q[i] in its low bits
    INT4     scale, low, q         W = scale * q + low         and q[i + 16] in its high ones
"""

import torch
from torch import Tensor

from satchel.model.encodings import ENCODINGS
from satchel.native.linear import GROUP, form

# O outputs, I inputs, B bytes of a row, G blocks of a row, J numbers of a block, L numbers in front of a block


def decode(raw_OB: Tensor, kind: str) -> Tensor:
    """The numbers in rows of blocks, [O, I], in float32 but for BF16."""
    if encoding := ENCODINGS.get(kind):
        return encoding.decode(raw_OB.reshape(-1, encoding.nbytes)).view(len(raw_OB), -1)
    _, inputs, nbytes, lead = form(kind)
    raw_OGB = raw_OB.unflatten(1, (-1, nbytes))
    scale_OG, *low = raw_OGB[..., : 2 * lead].contiguous().view(torch.bfloat16).float().unbind(-1)
    code_OGB = raw_OGB[..., 2 * lead :]
    if kind.startswith("INT8"):
        q_OGJ = code_OGB.contiguous().view(torch.int8).float()
    else:
        halves = code_OGB.unflatten(2, (-1, GROUP // 2))
        q_OGJ = torch.stack((halves & 15, halves >> 4), dim=3).view(*code_OGB.shape[:2], inputs).float()
    low_OG = low[0] if low else None if kind.startswith("INT8") else -8 * scale_OG
    q_OGJ.mul_(scale_OG[..., None])
    return (q_OGJ if low_OG is None else q_OGJ.add_(low_OG[..., None])).flatten(1)


def encode_q8(weight_OI: Tensor) -> Tensor:
    """A matrix as Q8_0 blocks, uint8 [O, G * 34]: scale = max |W| / 127 of each 32, in float16."""
    block_OGJ = weight_OI.float().unflatten(1, (-1, 32))
    scale_OG1 = (block_OGJ.abs().amax(-1, keepdim=True) / 127).half()
    inverse_OG1 = torch.where(scale_OG1 == 0, 0.0, 1 / scale_OG1.float())
    code_OGJ = (block_OGJ * inverse_OG1).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale_OG1.view(torch.uint8), code_OGJ.view(torch.uint8)], dim=2).flatten(1)


def join_int8(q_OGJ: Tensor, scale_OG: Tensor) -> Tensor:
    """INT8 blocks of codes (int8) and scales (bfloat16), uint8 [O, G * (2 + J)]."""
    return torch.cat([_bytes(scale_OG), q_OGJ.view(torch.uint8)], dim=2).flatten(1)


def join_int4(q_OGJ: Tensor, scale_OG: Tensor, low_OG: Tensor | None) -> Tensor:
    """INT4 blocks of codes (uint8) and numbers in bfloat16, or INT4S ones: uint8 [O, G * (4 or 2 + J / 2)]."""
    low, high = q_OGJ.unflatten(2, (-1, 2, GROUP // 2)).unbind(3)
    lead = [_bytes(scale_OG)] if low_OG is None else [_bytes(scale_OG), _bytes(low_OG)]
    return torch.cat([*lead, (low | high << 4).flatten(2)], dim=2).flatten(1)


def _bytes(number_OG: Tensor) -> Tensor:
    return number_OG.unsqueeze(-1).contiguous().view(torch.uint8)
