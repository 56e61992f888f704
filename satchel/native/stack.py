"""The kernel of a decoder below its head for CPUs, from Python: layers as `stack.cpp` knows them, and its call."""

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

from satchel.native import levels, linear
from satchel.native.build import build
from satchel.native.linear import Matrix
from satchel.native.paged import SIGHT

ACTS = ("silu", "gelu_tanh")  # as in stack.cpp
MAPS = ("q", "k", "v", "o", "gate", "up", "down")


class Layer(ctypes.Structure):
    """One block. Fields as in stack.cpp."""

    _fields_ = [
        *((name, Matrix) for name in MAPS),
        *((name, c_void_p) for name in ("into_attention", "into_mlp", "q_norm", "k_norm")),
        *((name, c_float) for name in ("eps", "scale", "cap")),
        *((name, c_int32) for name in ("window", "table", "act")),
    ]


class Call(ctypes.Structure):
    """The decoder and the rows of a step. Fields as in stack.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("layers", "embeddings", "tokens", "x", "y", "norm", "frequencies", "factors")),
        *((name, c_void_p) for name in ("pool", "room", "pages", "table", "first", "past", *SIGHT)),
        *((name, c_int64) for name in ("page_stride", "half_stride")),
        *((name, c_int32) for name in ("count", "rows", "width", "hidden", "heads", "kv_heads", "dim", "half")),
        *((name, c_int32) for name in ("kinds", "sequences", "threads")),
        *((name, c_float) for name in ("embed_scale", "eps")),
        *((name, c_int32) for name in ("bf16", "coded")),
    ]


@dataclass(frozen=True)
class Kernel:
    """The library, compiled for one level of instructions."""

    library: ctypes.CDLL

    def room_bytes(self, call: Call, bfloat16: bool) -> int:
        """Scratch memory of a call."""
        return self.library.satchel_stack_room(byref(call), c_int(bfloat16))

    def run(self, call: Call, bfloat16: bool) -> None:
        """Releases the interpreter's lock. Raises IndexError for a token that has no embedding."""
        if not self.library.satchel_stack(byref(call), c_int(bfloat16)):
            raise IndexError(
                f"a token is none of those that have {Matrix.from_address(call.embeddings).outputs} embeddings"
            )


@cache
def kernel(level: str = "auto") -> Kernel | None:
    """The kernel for a level at which products are right here; None without one."""
    products = linear.kernel(level)
    path = build("stack", levels.flags(products.level)) if products else None
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.satchel_stack_room.restype = c_int64
    return Kernel(library)
