"""The kernel of many low-rank updates for CPUs, from Python: the batch as `low_rank.cpp` knows it, and its one call."""

import ctypes
from ctypes import byref, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch

from satchel.native.build import FUSED, build


class Batch(ctypes.Structure):
    """One map's rows and updates. Fields as in low_rank.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "weights", "down", "up", "rank", "first", "stop", "scale")),
        *((name, c_int64) for name in ("x_row", "y_row")),
        *((name, c_int32) for name in ("runs", "inputs", "outputs")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The kernel, compiled on first use; None without a C++ compiler."""
    path = build("low_rank", FUSED)
    return None if path is None else ctypes.CDLL(str(path))


def add(kernel: ctypes.CDLL, batch: Batch, dtype: torch.dtype) -> None:
    """Add the updates to the batch's `y`. Releases the interpreter's lock."""
    kernel.satchel_low_rank(byref(batch), c_int(dtype == torch.bfloat16), c_int(torch.get_num_threads()))
