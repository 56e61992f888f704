"""The optimizers' kernel for CPUs, from Python: arrays and directions as `adam.cpp` knows them, and its calls.

The caller keeps every tensor alive and contiguous during a call. A call releases the interpreter's lock, runs on as
many threads as torch would, and gives the same bits whatever their number. It allocates nothing but threads' stacks.
"""

import ctypes
from collections.abc import Sequence
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


class Direction(ctypes.Structure):
    """A random direction: its seed, those of its zeros and their share of 2^31, and how far it is gone to measure."""

    _fields_ = [("seed", c_uint64), ("mask_seed", c_uint64), ("masked", c_int32), ("radius", c_float)]


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

    def perturb_(self, x: Array, direction: Direction, back: int, forth: int, count: int) -> None:
        """From `back` radii along the direction to `forth` radii; each is -1, 0 or 1."""
        self.library.satchel_perturb(byref(x), byref(direction), back, forth, c_int64(count), torch.get_num_threads())

    def descend_(
        self,
        x: Array,
        momentum: Array | None,
        directions: Sequence[Direction],
        size_K: Tensor,
        rates: tuple[float, float, float],
        count: int,
        seed: int,
    ) -> None:
        """With rates (beta, lr, keep) and g the sum of the directions by size: m = beta m + g; x = keep x - lr m."""
        m, numbers = None if momentum is None else byref(momentum), (c_float(rate) for rate in rates)
        self.library.satchel_descend(byref(x), m, *_sum(directions, size_K), *numbers, c_int64(count), *_how(seed))

    def estimate(self, x: Array, out: Array, directions: Sequence[Direction], size_K: Tensor, count: int) -> None:
        """The sum of the directions by size into `out`."""
        arrays, threads = (byref(x), byref(out)), torch.get_num_threads()
        self.library.satchel_estimate(*arrays, *_sum(directions, size_K), c_int64(count), threads)


def _sum(directions: Sequence[Direction], size_K: Tensor) -> tuple[ctypes.Array[Direction], c_void_p, int]:
    """Directions and their sizes, contiguous float32, which the caller keeps alive."""
    count = len(directions)
    return (Direction * count)(*directions), c_void_p(size_K.data_ptr()), count


def _how(seed: int) -> tuple[c_uint64, c_int]:
    return c_uint64(seed), c_int(torch.get_num_threads())


@cache
def kernel() -> Kernel | None:
    """The kernel, compiled on first use; None without a C++ compiler."""
    path = build("adam", ARITHMETIC)
    return None if path is None else Kernel(ctypes.CDLL(str(path)))


def takes(*tensors: Tensor) -> bool:
    """Whether there is a kernel, and these parameters, gradients or steps lie as it needs them."""
    fit = all(t.device.type == "cpu" and t.dtype in KINDS and t.is_contiguous() for t in tensors)
    return fit and kernel() is not None


def loaded() -> Kernel:
    """The kernel, where it `takes` something."""
    found = kernel()
    assert found is not None
    return found
