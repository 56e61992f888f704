"""The small operators between a decoder's products, for CPUs: RMS norm, rotary positions, gated activation.

Each is one pass over memory where torch makes three to nine. Float32 inside, rounded once, so that a bfloat16 result
may differ from that of torch's operators in its last bit. They keep nothing for a backward pass: `model/functional.py`
has the ones that do, and calls these where no gradient can be asked for.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from satchel.core.errors import UserError
from satchel.native.build import FUSED, build

# N rows, D width, F hidden features, B batch, T tokens, H heads, E head dim, R half of the rotated dimensions

DTYPES = (torch.float32, torch.bfloat16)
CLASSES = (Tensor, torch.nn.Parameter)
ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # as in pointwise.cpp


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled on first use; None without a C++ compiler."""
    path = build("pointwise", FUSED)
    if path is None:
        return None
    found, ends = ctypes.CDLL(str(path)), [c_int, c_int]  # the last two: whether bfloat16, threads
    found.satchel_rms_norm.argtypes = [*[c_void_p] * 3, *[c_int64] * 2, c_float, c_float, c_int, *ends]
    found.satchel_rotate.argtypes = [*[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 3, *ends]
    found.satchel_gated.argtypes = [*[c_void_p] * 3, *[c_int64] * 4, c_int, *ends]
    return found


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels exist and these are real tensors on the CPU, all of one dtype that they know.

    False within a rehearsal, whose tensors are of a class of their own.
    """
    dtype = x.dtype
    for t in (x, *others):
        if t.dtype != dtype or not t.is_cpu or type(t) not in CLASSES:
            return False
    return dtype in DTYPES and library() is not None


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float = 1e-6, *, plus_one: bool = False, late_cast: bool = False
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., D] to [..., D].

    `late_cast` multiplies by the weight before rounding to x's type rather than after; `plus_one` (which implies it)
    stores the weight less one, as Gemma does. Raises UserError for what is not float32 or bfloat16 on the CPU, and
    without a C++ compiler.
    """
    _check("rms_norm", x, weight_D)
    if weight_D.shape != x.shape[-1:]:
        raise UserError(f"rms_norm: a weight of shape {tuple(weight_D.shape)} for x of shape {tuple(x.shape)}")
    return normed(x, weight_D, eps, plus_one, late_cast or plus_one)


def rotate(x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turns the pairs (r, r + R) of each head by the tables' angles; dimensions beyond 2R stay, [B, T, H, E].

    The tables are of x's type. Raises UserError as `rms_norm` does, and where the shapes do not fit.
    """
    _check("rotate", x_BTHE, cos_TR, sin_TR)
    tokens, dim, half = x_BTHE.shape[1], x_BTHE.shape[-1], cos_TR.shape[-1]
    if cos_TR.shape != (tokens, half) or sin_TR.shape != cos_TR.shape or 2 * half > dim:
        shapes = f"{tuple(cos_TR.shape)} and {tuple(sin_TR.shape)}"
        raise UserError(f"rotate: tables of {shapes} for {tokens} tokens with heads of {dim}; take [T, R], 2R <= E")
    return rotated(x_BTHE, cos_TR, sin_TR)


def gated(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up, [..., F] each; `act` is silu, gelu, gelu_tanh or relu.

    Raises UserError as `rms_norm` does, for another `act`, and where the shapes differ.
    """
    _check("gated", gate, up)
    if act not in ACTS or gate.shape != up.shape:
        raise UserError(f"gated: '{act}' of {tuple(gate.shape)} times {tuple(up.shape)}; act is one of {list(ACTS)}")
    return activated(gate, up, act)


def normed(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool, late: bool) -> Tensor:
    """`rms_norm` of what is known to fit."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    pointers = x.data_ptr(), weight_D.data_ptr(), out.data_ptr()
    _kernels().satchel_rms_norm(*pointers, rows, width, eps, plus_one, late, *_how(x))
    return out


def rotated(x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """`rotate` of what is known to fit."""
    x_BTHE = x_BTHE if _rows_follow(x_BTHE) else x_BTHE.contiguous()
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    batch, tokens, heads, dim = x_BTHE.shape
    out = torch.empty((batch, tokens, heads, dim), dtype=x_BTHE.dtype)
    pointers = x_BTHE.data_ptr(), cos_TR.data_ptr(), sin_TR.data_ptr(), out.data_ptr()
    rows = batch * tokens, x_BTHE.stride(1 if tokens > 1 else 0), max(tokens, 1)
    _kernels().satchel_rotate(*pointers, *rows, heads, dim, cos_TR.shape[-1], *_how(x_BTHE))
    return out


def activated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`gated` of what is known to fit."""
    gate_NF, up_NF = _matrix(gate), _matrix(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    pointers, strides = (gate_NF.data_ptr(), up_NF.data_ptr(), out.data_ptr()), (gate_NF.stride(0), up_NF.stride(0))
    _kernels().satchel_gated(*pointers, *gate_NF.shape, *strides, ACTS[act], *_how(gate))
    return out


def _check(name: str, *tensors: Tensor) -> None:
    if not takes(*tensors):
        reason = "takes float32 or bfloat16 on the CPU, all alike" if library() else "needs a C++ compiler: install g++"
        raise UserError(f"{name}: {reason}")


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None, "takes() has seen it"
    return found


def _how(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _rows_follow(x_BTHE: Tensor) -> bool:
    """Whether each token's heads lie together and the tokens lie at equal distances."""
    batch, tokens, heads, dim = x_BTHE.shape
    b, t, h, e = x_BTHE.stride()
    return (e == 1 or dim < 2) and (h == dim or heads < 2) and (batch < 2 or tokens < 2 or b == tokens * t)


def _matrix(x: Tensor) -> Tensor:
    """[..., F] as [N, F] with contiguous rows, a view where that can be."""
    if x.dim() == 3 and x.shape[0] == 1:
        x = x[0]
    if x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] < 2):
        return x
    return x.contiguous().view(x.numel() // max(x.shape[-1], 1), x.shape[-1])
