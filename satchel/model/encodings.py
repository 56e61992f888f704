"""How numbers lie in a weight file, and how they become a tensor again.

A file stores a tensor as blocks: `values` numbers in `nbytes` bytes. Plain types are blocks of one number. GGUF's
quantized types hold 32 numbers (Q4_0 ... Q8_0) or 256 (the K types) with their scales; a number is

    scale * q            Q4_0, Q5_0, Q8_0, Q6_K   (q signed)
    scale * q + offset   Q4_1, Q5_1               (q unsigned)
    scale * q - offset   Q4_K, Q5_K               (scale and offset are 6-bit multiples of two float16)

The arithmetic is float32 in the order of the `gguf` package, so the results are bit-equal to its `dequantize`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# N blocks, B bytes of a block, Q numbers of a block


@dataclass(frozen=True)
class Encoding:
    """`decode` turns bytes [N, B] (uint8) into numbers [N, Q], in float32 or in the plain type itself."""

    values: int  # numbers in a block
    nbytes: int  # bytes of a block
    decode: Callable[[Tensor], Tensor]


def _plain(dtype: torch.dtype) -> Encoding:
    return Encoding(1, dtype.itemsize, lambda raw_NB: raw_NB.view(dtype))


def _half(raw_NB: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [N, 1]."""
    return raw_NB[:, start : start + 2].view(torch.float16).float()


def _nibbles(raw_NB: Tensor, group: int) -> Tensor:
    """The 4-bit numbers of bytes [N, B] as uint8 [N, 2B]: of each `group` bytes first all low ones, then all high."""
    raw_NGB = raw_NB.unflatten(1, (-1, group))
    return torch.stack((raw_NGB & 15, raw_NGB >> 4), dim=2).flatten(1)


def _bits(raw_NB: Tensor, width: int, count: int) -> Tensor:
    """`count` fields of `width` bits from every byte, lowest first: uint8 [N, count, B]."""
    shift_C1 = torch.arange(0, count * width, width, dtype=torch.uint8, device=raw_NB.device)[:, None]
    return (raw_NB[:, None] >> shift_C1) & ((1 << width) - 1)


def _fifth_bits(raw_NB: Tensor) -> Tensor:
    """The fifth bits that Q5_0 and Q5_1 keep in four bytes, in their place: uint8 [N, 32], 0 or 16."""
    return _bits(raw_NB, 1, 8).transpose(1, 2).flatten(1) << 4


def _q4_0(raw_NB: Tensor) -> Tensor:
    return _nibbles(raw_NB[:, 2:], 16).float().sub_(8).mul_(_half(raw_NB, 0))


def _q4_1(raw_NB: Tensor) -> Tensor:
    return _nibbles(raw_NB[:, 4:], 16).float().mul_(_half(raw_NB, 0)).add_(_half(raw_NB, 2))


def _q5_0(raw_NB: Tensor) -> Tensor:
    q_NQ = _nibbles(raw_NB[:, 6:], 16) | _fifth_bits(raw_NB[:, 2:6])
    return q_NQ.float().sub_(16).mul_(_half(raw_NB, 0))


def _q5_1(raw_NB: Tensor) -> Tensor:
    q_NQ = _nibbles(raw_NB[:, 8:], 16) | _fifth_bits(raw_NB[:, 4:8])
    return q_NQ.float().mul_(_half(raw_NB, 0)).add_(_half(raw_NB, 2))


def _q8_0(raw_NB: Tensor) -> Tensor:
    return raw_NB[:, 2:].view(torch.int8).float().mul_(_half(raw_NB, 0))


def _k_scales(raw_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the 8 groups of a Q4_K or Q5_K block, float32 [N, 8, 1], from its first 16 bytes.

    Twelve bytes hold 16 six-bit numbers: those of groups 0-3 in the low bits of bytes 0-7; those of groups 4-7 have
    their low four bits in bytes 8-11 and their high two in the bits that bytes 0-7 leave free.
    """
    a_NB, b_NB, low_NB = raw_NB[:, 4:8], raw_NB[:, 8:12], raw_NB[:, 12:16]
    scale_NG = torch.cat((a_NB & 63, (low_NB & 15) | ((a_NB >> 2) & 48)), dim=1)
    offset_NG = torch.cat((b_NB & 63, (low_NB >> 4) | ((b_NB >> 2) & 48)), dim=1)
    return (scale_NG * _half(raw_NB, 0))[..., None], (offset_NG * _half(raw_NB, 2))[..., None]


def _q4_k(raw_NB: Tensor) -> Tensor:
    scale_NG1, offset_NG1 = _k_scales(raw_NB)
    q_NGQ = _nibbles(raw_NB[:, 16:], 32).unflatten(1, (8, 32))
    return q_NGQ.float().mul_(scale_NG1).sub_(offset_NG1).flatten(1)


def _q5_k(raw_NB: Tensor) -> Tensor:
    scale_NG1, offset_NG1 = _k_scales(raw_NB)
    q_NGQ = _nibbles(raw_NB[:, 48:], 32).unflatten(1, (8, 32)) | (_bits(raw_NB[:, 16:48], 1, 8) << 4)
    return q_NGQ.float().mul_(scale_NG1).sub_(offset_NG1).flatten(1)


def _q6_k(raw_NB: Tensor) -> Tensor:
    scale_NG1 = (raw_NB[:, 192:208].view(torch.int8) * _half(raw_NB, 208))[..., None]
    high_NB = torch.cat([_bits(part, 2, 4).flatten(1) for part in raw_NB[:, 128:192].split(32, dim=1)], dim=1)
    q_NB = _nibbles(raw_NB[:, :128], 64) | (high_NB << 4)
    return q_NB.float().sub_(32).unflatten(1, (16, 16)).mul_(scale_NG1).flatten(1)


PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ENCODINGS = {name: _plain(dtype) for name, dtype in PLAIN.items()} | {
    "Q4_0": Encoding(32, 18, _q4_0),
    "Q4_1": Encoding(32, 20, _q4_1),
    "Q5_0": Encoding(32, 22, _q5_0),
    "Q5_1": Encoding(32, 24, _q5_1),
    "Q8_0": Encoding(32, 34, _q8_0),
    "Q4_K": Encoding(256, 144, _q4_k),
    "Q5_K": Encoding(256, 176, _q5_k),
    "Q6_K": Encoding(256, 210, _q6_k),
}
