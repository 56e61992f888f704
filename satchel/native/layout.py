"""The kernel that lays rows of blocks in tiles, from Python: see layout.cpp."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from satchel.native.build import ARITHMETIC, build

# O outputs, B bytes of a row

CONVERTED = {"Q5_0": (32, 22), "Q5_1": (32, 24), "Q5_K": (256, 176), "Q6_K": (256, 210)}  # numbers, bytes of a block
CONVERTED |= {"F16": (32, 64), "BF16": (32, 64), "F32": (32, 128)}
ROWS, Q8_BYTES = 16, 34


@cache
def library() -> ctypes.CDLL | None:
    """The kernel, compiled on first use; None without a C++ compiler."""
    path = build("layout", ARITHMETIC)
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    found.satchel_tiles.argtypes = [*[c_void_p] * 2, *[c_int64] * 2, *[c_int] * 3]
    found.satchel_tiles_q8.argtypes = [*[c_void_p] * 2, *[c_int64] * 2, *[c_int] * 2]
    return found


def lay(kernel: ctypes.CDLL, raw_OB: Tensor, fields: list[int]) -> Tensor:
    """Rows of blocks, contiguous uint8, in tiles; `fields` of a block: 2 bytes each, then 4 bytes each."""
    assert fields == sorted(fields) and set(fields) <= {2, 4}
    tiles = raw_OB.new_empty(-(-len(raw_OB) // ROWS) * ROWS * raw_OB.shape[1])
    sizes = len(raw_OB), raw_OB.shape[1] // sum(fields), sum(fields), fields.count(2)
    kernel.satchel_tiles(raw_OB.data_ptr(), tiles.data_ptr(), *sizes, torch.get_num_threads())
    return tiles


def lay_as_q8(kernel: ctypes.CDLL, raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks of a kind of CONVERTED, contiguous uint8, as tiles of Q8_0."""
    numbers, nbytes = CONVERTED[kind]
    blocks = raw_OB.shape[1] // nbytes
    tiles = raw_OB.new_empty(-(-len(raw_OB) // ROWS) * ROWS * blocks * numbers // 32 * Q8_BYTES)
    sizes = len(raw_OB), blocks, list(CONVERTED).index(kind)
    kernel.satchel_tiles_q8(raw_OB.data_ptr(), tiles.data_ptr(), *sizes, torch.get_num_threads())
    return tiles
