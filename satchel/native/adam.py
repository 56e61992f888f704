"""The optimizers' kernel for CPUs, from Python: arrays as `adam.cpp` knows them, and its two calls.

The caller keeps every tensor alive and contiguous during a call. A call releases the interpreter's lock, runs on as
many threads as torch would, and gives the same bits whatever their number. It allocates nothing but threads' stacks.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from satchel.native.build import ARITHMETIC, build

FLOAT, NEAREST, STOCHASTIC, SPLIT, CODES = range(5)  # how an array is kept; the middle three are bfloat16
KINDS = {torch.float32: FLOAT, torch.bfloat16: NEAREST}


class Array(ctypes.Structure):
    """Elements in memory and how they are kept. Fields as in adam.cpp."""

    _fields_ = [(name, c_void_p) for name in ("data", "low", "scale", "value", "cell")] + [("kind", c_int32)]

    def __init__(self, kind: int, data: Tensor, **others: Tensor) -> None:
        super().__init__(kind=kind, data=data.data_ptr(), **{name: t.data_ptr() for name, t in others.items()})


class Rates(ctypes.Structure):
    """The numbers of one step of Adam, each rounded to float32 as torch would."""

    _fields_ = [(n, c_float) for n in ("grow1", "beta2", "grow2", "eps", "step_size", "keep")]


class Kernel(NamedTuple):
    """The compiled library."""

    library: ctypes.CDLL

    def adam_(self, x: Array, g: Array, m: Array, v: Array, rates: Rates, count: int, seed: int) -> None:
        """m and v move towards g and g**2;  x = keep * x - step_size * m / (sqrt(v) + eps)."""
        arrays = (byref(a) for a in (x, g, m, v))
        self.library.satchel_adam(*arrays, byref(rates), c_int64(count), *_how(seed))

    def move_(self, x: Array, step: Array, keep: float, count: int, seed: int) -> None:
        """x = keep * x + step."""
        self.library.satchel_move(byref(x), byref(step), c_float(keep), c_int64(count), *_how(seed))


def _how(seed: int) -> tuple[c_uint64, c_int]:
    return c_uint64(seed), c_int(torch.get_num_threads())


@cache
def kernel() -> Kernel | None:
    """The kernel, compiled on first use; None without a C++ compiler."""
    path = build("adam", ARITHMETIC)
    return None if path is None else Kernel(ctypes.CDLL(str(path)))


def takes(*tensors: Tensor) -> bool:
    """Whether these parameters, gradients or steps lie as the kernel needs them."""
    return all(t.device.type == "cpu" and t.dtype in KINDS and t.is_contiguous() for t in tensors)
