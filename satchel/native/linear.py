"""The kernel of linear maps in tiles for CPUs, from Python: matrices as `linear.cpp` knows them, and its calls.

A kind says how rows lie in blocks, in a file or in ours: 'Q4_0', 'BF16'; where the size of a block is free, it is part
of the kind: 'INT4:64' has scales for each 64 inputs.
"""

import ctypes
from ctypes import byref, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from satchel.native import levels
from satchel.native.build import build

FILES = {"Q4_0": (32, 18, 1), "Q4_1": (32, 20, 2), "Q8_0": (32, 34, 1), "Q4_K": (256, 144, 2), "BF16": (32, 64, 0)}
OURS = {"INT8": (8, 1), "INT4S": (4, 1), "INT4": (4, 2)}  # bits of a code, numbers of 16 bits in front
NAMES = (*FILES, *OURS)  # as in matrix.h
KINDS = (*FILES, "INT8:32", "INT8:96", "INT4S:32", "INT4:64", "INT4:96")  # all that tests have to try
ROWS = 16  # of a tile
GROUP = 32  # inputs that share the scale of an activation: those of a block are a multiple
DTYPES = (torch.float32, torch.bfloat16)


class Form(NamedTuple):
    """How a kind lies in memory."""

    number: int  # of its name, in matrix.h
    inputs: int  # of a block
    nbytes: int  # of a block
    lead: int  # numbers of 16 bits in front of a block; fields of 4 bytes follow


@cache
def form(kind: str) -> Form:
    """The form of a kind."""
    name, _, group = kind.partition(":")
    if name in FILES:
        return Form(NAMES.index(name), *FILES[name])
    bits, lead = OURS[name]
    return Form(NAMES.index(name), int(group), 2 * lead + int(group) * bits // 8, lead)


class Matrix(ctypes.Structure):
    """A matrix [O, I] in tiles. Fields as in matrix.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("tiles", "bias")),
        *((name, c_int32) for name in ("kind", "outputs", "inputs", "group")),
    ]


class Call(ctypes.Structure):
    """One product. Fields as in linear.cpp."""

    _fields_ = [
        ("matrix", Matrix),
        *((name, c_void_p) for name in ("x", "y", "room")),
        ("x_row", c_int64),
        *((name, c_int32) for name in ("rows", "threads")),
    ]


def matrix(tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, inputs: int) -> Matrix:
    """The caller keeps `tiles` and `bias_O`, which is float32, alive and contiguous."""
    number, group, _, _ = form(kind)
    return Matrix(tiles.data_ptr(), None if bias_O is None else bias_O.data_ptr(), number, outputs, inputs, group)


@dataclass(frozen=True)
class Kernel:
    """The library, compiled for one level of instructions. Its calls release the interpreter's lock."""

    level: str
    library: ctypes.CDLL

    @property
    def many(self) -> int:
        """Rows of inputs from which none is rounded to 8 bits; 0: as many as they are."""
        return self.library.satchel_many()

    def linear(self, weight: Matrix, x_NI: Tensor, y_NO: Tensor) -> None:
        """y = x W^T + b; x of DTYPES, its rows contiguous each, y of the same dtype and contiguous."""
        room = torch.empty(room_bytes(*x_NI.shape), dtype=torch.uint8)
        tensors = (t.data_ptr() for t in (x_NI, y_NO, room))
        call = Call(weight, *tensors, x_NI.stride(0), x_NI.shape[0], torch.get_num_threads())
        self.library.satchel_linear(byref(call), c_int(x_NI.dtype == torch.bfloat16))

    def rows(self, weight: Matrix, at_N: Tensor, out_NI: Tensor) -> None:
        """Rows of the matrix by number (int64), as numbers of DTYPES. Raises IndexError for one that it has not."""
        at, out = c_void_p(at_N.data_ptr()), c_void_p(out_NI.data_ptr())
        bfloat16 = c_int(out_NI.dtype == torch.bfloat16)
        if not self.library.satchel_rows(byref(weight), at, c_int64(len(at_N)), out, bfloat16):
            raise IndexError(f"rows from {int(at_N.min())} to {int(at_N.max())} of a matrix of {weight.outputs}")

    def dense(self, weight: Matrix, out_OI: Tensor) -> None:
        """The whole matrix as numbers of DTYPES."""
        threads, bfloat16 = c_int(torch.get_num_threads()), c_int(out_OI.dtype == torch.bfloat16)
        self.library.satchel_dense(byref(weight), c_void_p(out_OI.data_ptr()), bfloat16, threads)


def room_bytes(rows: int, inputs: int) -> int:
    """Scratch memory of a product: its inputs as codes or as bfloat16 in tiles."""
    return 2 * -(-rows // ROWS) * ROWS * inputs


@cache
def kernel(level: str = "auto") -> Kernel | None:
    """The kernel for a level; `auto`: the fastest one whose results are right here. None without a C++ compiler."""
    if level == "auto":
        return next(filter(None, map(kernel, levels.supported())), None)
    path = build("linear", levels.flags(level)) if level in levels.supported() else None
    found = Kernel(level, ctypes.CDLL(str(path))) if path else None
    with _disable_current_modes():  # a rehearsal may be the first to ask, and its tensors have no data
        return found if found and all(right(found, kind) for kind in KINDS) else None


def right(kernel: Kernel, kind: str) -> bool:
    """Whether products of few and of many rows are those of the matrix's own rows, as far as 8 bits can tell."""
    inputs, outputs = 2 * form(kind).inputs, 2 * ROWS
    tiles = example(kind, outputs, inputs, torch.Generator().manual_seed(0))
    weight = matrix(tiles, None, kind, outputs, inputs)
    dense_OI, many_NI = torch.empty(outputs, inputs), torch.arange(48 * inputs).sin().view(48, inputs)
    kernel.rows(weight, torch.arange(outputs), dense_OI)
    for x_NI in (many_NI[:3], many_NI):
        y_NO, expected_NO = torch.empty(len(x_NI), outputs), x_NI @ dense_OI.T
        kernel.linear(weight, x_NI, y_NO)
        if not (y_NO - expected_NO).norm() <= 0.02 * expected_NO.norm():
            return False
    return True


def example(kind: str, outputs: int, inputs: int, rng: torch.Generator) -> Tensor:
    """Random tiles: any bytes are a matrix, once the numbers of 16 bits are numbers."""
    number, each, nbytes, lead = form(kind)
    tiles = torch.randint(0, 256, (outputs // ROWS * inputs // each, nbytes * ROWS), dtype=torch.uint8, generator=rng)
    halves = (lead if lead else nbytes // 2) * ROWS
    dtype = torch.bfloat16 if number >= NAMES.index("BF16") else torch.float16
    scale = torch.rand(len(tiles), halves, generator=rng).to(dtype)
    tiles[:, : 2 * halves] = scale.view(torch.uint8)
    return tiles.flatten()
