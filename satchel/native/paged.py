"""The attention kernel for CPUs, from Python: the batch as `paged.cpp` knows it, and its one call."""

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch

from satchel.native import levels, linear
from satchel.native.build import build

PAGE = 16  # tokens; as in paged.cpp
SIGHT = ("limit", "seen", "position")  # what a row may see, [N] each


class Batch(ctypes.Structure):
    """One layer's new tokens, pages and tables. Fields as in paged.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "keys", "values", "out", "pages", "table", "first", "past")),
        *((name, c_void_p) for name in SIGHT),
        *((name, c_int64) for name in ("page_stride", "q_row", "k_row")),
        *((name, c_int32) for name in ("sequences", "heads", "kv_heads", "dim", "window", "coded")),
        ("scale", c_float),
        ("cap", c_float),
    ]


@cache
def library(level: str = "auto") -> ctypes.CDLL | None:
    """The kernel for a level at which products are right here, compiled on first use; None without a C++ compiler."""
    products = linear.kernel(level)
    path = build("paged", levels.flags(products.level)) if products else None
    return None if path is None else ctypes.CDLL(str(path))


def attend(kernel: ctypes.CDLL, batch: Batch, dtype: torch.dtype) -> None:
    """Store the batch's keys and values, and write its `out`. Releases the interpreter's lock."""
    kernel.satchel_paged_attention(byref(batch), c_int(dtype == torch.bfloat16), c_int(torch.get_num_threads()))
