"""Choosing a token from a row of logits on a CPU; `model/sampling.py` defines what is chosen.

Where its last bits would decide, the kernel leaves the choice to its caller instead of rounding in its own way, so that
with it and without it the same token comes.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache

import torch
from torch import Tensor

from satchel.core.errors import UserError
from satchel.native.build import FUSED, build

# V vocabulary


@cache
def library() -> ctypes.CDLL | None:
    """The kernel, compiled on first use; None without a C++ compiler."""
    path = build("draw", FUSED)
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    found.satchel_sample.argtypes = [c_void_p, c_int64, c_float, c_int, c_float, c_float, c_uint64]
    found.satchel_sample.restype = c_int64
    return found


def takes(logits_V: Tensor) -> bool:
    """Whether the kernel exists and reads this row: float32, contiguous, on the CPU."""
    plain = type(logits_V) is Tensor and logits_V.is_cpu and logits_V.dtype == torch.float32
    return plain and logits_V.is_contiguous() and library() is not None


def sample(
    logits_V: Tensor, key: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int | None:
    """A token drawn from softmax(logits / temperature) over what top_k (0: all), then top_p, then min_p leave.

    The draw is a function of `key`, 64 bits, and the logits. None, in one of some ten thousand draws, where rounding
    decides between two tokens: `satchel.model.sampling.choose` decides it. Raises UserError for a row that is not
    contiguous float32 on the CPU, and without a C++ compiler.
    """
    found = library()
    if found is None or not takes(logits_V):
        raise UserError("sample: takes a contiguous row of float32 on the CPU, and needs a C++ compiler")
    lowest = math.log(min_p) if min_p > 0 else -math.inf
    token = found.satchel_sample(logits_V.data_ptr(), len(logits_V), temperature, top_k, top_p, lowest, key)
    return None if token < 0 else token
