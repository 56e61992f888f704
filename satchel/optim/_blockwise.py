"""Moments in 8 bits: blocks of 256 values share a scale, and a value is the nearest of 256 codes.

The codes are dense near zero and near one (a "dynamic tree": an exponent of one to seven bits, the rest a fraction):
symmetric for the first moment, positive only for the second. 1 byte and 4/256 a value.

The nearest code is found exactly, without a search: the upper 16 bits of a float32 value name a cell of the number
line that holds at most one midpoint between codes; a table gives the cell's lower code, one comparison the rest.
Paper: https://arxiv.org/abs/2110.02861
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from satchel.native.adam import CODES, Array

# N elements, a multiple of BLOCK but in a parameter's last slice; C blocks, B elements of a block

BLOCK = 256


class Codebook(NamedTuple):
    """The map of one moment, on one device."""

    value_256: Tensor  # float32, ascending
    midpoint_256: Tensor  # float32, between a code and the next; nothing is above the last
    cell_65536: Tensor  # int32: the code of the cell's least value | 2^16 * the lower bits of the last nearest to it


@cache
def codes(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic map, ascending, in [-1, 1] or [0, 1]."""
    values = [0.0, 1.0]
    for digit in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (digit if signed else digit + 1) + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (digit - 6)).tolist()
        values += means + ([-value for value in means] if signed else [])
    return tuple(sorted(values))


@cache
def codebook(signed: bool, device: torch.device) -> Codebook:
    """The codes and what finding the nearest takes: 260 KiB, made once for a device.

    A negative value's lower bits are counted inverted, so that they rise with the value.
    """
    value = torch.tensor(codes(signed))
    midpoint = torch.cat([(value[1:] + value[:-1]) / 2, torch.tensor([float("inf")])])
    cell = torch.arange(1 << 16, dtype=torch.int32)
    least = torch.where(cell < 1 << 15, cell << 16, (cell << 16) | 0xFFFF).view(torch.float32)
    lower = torch.bucketize(least, midpoint[:-1], out_int32=True)
    bits = midpoint[:-1].view(torch.int32)
    last = torch.full((1 << 16,), 0xFFFF, dtype=torch.int32)
    last[((bits >> 16) & 0xFFFF).long()] = torch.where(bits < 0, ~bits, bits) & 0xFFFF
    return Codebook(*(t.to(device) for t in (value, midpoint, lower | last << 16)))


def codebook_for(signed: bool, held: Tensor) -> Codebook:
    """The map that reads and writes this state; of a fake one, no more than its sizes."""
    if not isinstance(held, FakeTensor):
        return codebook(signed, held.device)
    value, cell = held.new_empty(256, dtype=torch.float32), held.new_empty(1 << 16, dtype=torch.int32)
    return Codebook(value, value, cell)


def quantise(wide_N: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Codes [N] in uint8 and scales [C] of float32 values, which are used up."""
    block_CB = _blocks(wide_N)
    scale_C = block_CB.abs().amax(1)
    unit_N = block_CB.div_(scale_C.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)
    cell_N = (unit_N.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    code_N = book.cell_65536.index_select(0, cell_N).bitwise_and_(0xFF)
    code_N.add_(unit_N > book.midpoint_256.index_select(0, code_N))
    return code_N[: wide_N.numel()].to(torch.uint8), scale_C


def dequantise(code_N: Tensor, scale_C: Tensor, book: Codebook) -> Tensor:
    """The float32 values that codes and scales stand for."""
    unit_N = book.value_256.index_select(0, code_N.int())
    return _blocks(unit_N).mul_(scale_C[:, None]).view(-1)[: code_N.numel()]


def _blocks(x_N: Tensor) -> Tensor:
    """[C, B]; the last block is filled up with zeros, in a copy."""
    short = -x_N.numel() % BLOCK
    return (F.pad(x_N, (0, short)) if short else x_N).view(-1, BLOCK)


@dataclass(frozen=True)
class Blockwise:
    """Moments kept in 8 bits, block by block."""

    def zeros(self, count: int, device: torch.device, signed: bool) -> dict[str, Tensor]:
        """The state of one moment of `count` elements; a scale of zero makes every code zero."""
        return {
            "": torch.zeros(count, dtype=torch.uint8, device=device),
            "_scale": torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device),
        }

    def read(self, held: Sequence[Tensor], cut: slice, signed: bool) -> Tensor:
        """The moment's slice in float32."""
        code_N, scale_C = held
        return dequantise(code_N[cut], scale_C[_of_blocks(cut)], codebook_for(signed, code_N))

    def write_(self, held: Sequence[Tensor], cut: slice, wide_N: Tensor, signed: bool, noise_N: Tensor | None) -> None:
        """Put the slice back, rounded to the nearest code."""
        codes_N, scales_C = held
        code_N, scale_C = quantise(wide_N, codebook_for(signed, codes_N))
        codes_N[cut].copy_(code_N)
        scales_C[_of_blocks(cut)].copy_(scale_C)

    def array(self, held: Sequence[Tensor], signed: bool) -> Array:
        """The moment as the kernel knows it."""
        code_N, scale_C = held
        book = codebook(signed, code_N.device)
        return Array(CODES, code_N, scale=scale_C, value=book.value_256, cell=book.cell_65536)


def _of_blocks(cut: slice) -> slice:
    return slice(cut.start // BLOCK, -(-cut.stop // BLOCK))
