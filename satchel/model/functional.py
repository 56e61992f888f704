"""The decoder's arithmetic, with backward passes that keep as little as can be.

What each function keeps for its backward pass:
    rms_norm               x and one number a row                    (torch: x in float32, its normalised copy, ...)
    gated                  gate and up                               (torch: also act(gate))
    rotate                 the tables                                (torch: both factors of each product)
    chunked_cross_entropy  the gradient of x, and of the weight if it trains; never more than a chunk of logits

Reductions run in float32 (float64 for float64). All run under FakeTensorMode and make no copy to the host. In
inference mode on a CPU native/pointwise.cpp does rms_norm and rotate, in a third of torch's time for a few rows; gated
would take it as long as torch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from satchel.model.cross_entropy import chunked_cross_entropy
from satchel.model.tangent import apply, tangents_flow
from satchel.native import pointwise as native

# B batch, T tokens, D width, H heads, E head dim, R half of the rotated dimensions

__all__ = ["activate", "chunked_cross_entropy", "gated", "geglu", "rms_norm", "rotate", "swiglu", "wide"]

aten = torch.ops.aten


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which reductions over `dtype` run."""
    return torch.promote_types(dtype, torch.float32)


def _nobody_asks(*tensors: Tensor) -> bool:
    """Whether no gradient and no tangent can be asked for, so that a kernel may do it."""
    return torch.is_inference_mode_enabled() and native.takes(*tensors)


def _widened(x: Tensor) -> Tensor:
    """A copy in the type of reductions, free to be written to."""
    return x.to(wide(x.dtype), copy=True)


def normed(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool, late_cast: bool) -> tuple[Tensor, Tensor]:
    """What `rms_norm` says, and 1 / sqrt(mean(x^2) + eps), by torch's operators."""
    y = _widened(x)
    rstd = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y.mul_(rstd)
    if not late_cast:
        return y.to(x.dtype).mul_(weight_D), rstd
    return y.mul_(weight_D.to(y.dtype) + 1 if plus_one else weight_D).to(x.dtype), rstd


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, plus_one: bool, late_cast: bool) -> Tensor:
        y, rstd = normed(x, weight_D, eps, plus_one, late_cast)
        ctx.save_for_backward(x, weight_D, rstd)
        ctx.plus_one = plus_one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, rstd = ctx.saved_tensors
        full_D = weight_D.to(rstd.dtype) + ctx.plus_one
        normed, dx = _widened(x).mul_(rstd), _widened(grad)
        product = dx * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        mean = (product @ full_D).div_(x.shape[-1]).unsqueeze(-1)
        dx = dx.mul_(full_D).addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)
        return dx, grad_weight, None, None, None


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float = 1e-6, *, plus_one: bool = False, late_cast: bool = False
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., D] to [..., D].

    `late_cast` multiplies by the weight before rounding to x's type rather than after; `plus_one` (which implies it)
    stores the weight less one, as Gemma does.
    """
    if _nobody_asks(x, weight_D):
        return native.normed(x, weight_D, eps, plus_one, late_cast or plus_one)
    return apply(_RMSNorm, x, weight_D, eps, plus_one, late_cast or plus_one)


# Each activation, and the operator that turns the gradient of its result into that of its argument, in place.
ACTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, lambda grad, x: aten.silu_backward.grad_input(grad, x, grad_input=grad)),
    "gelu": (F.gelu, lambda grad, x: aten.gelu_backward.grad_input(grad, x, grad_input=grad)),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
    ),
    "relu": (F.relu, lambda grad, x: aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)),
}


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return ACTS[act][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        act, act_backward = ACTS[ctx.act]
        return act_backward(grad * up, gate), act(gate).mul_(grad), None


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, for `act` one of ACTS."""
    return apply(_Gated, gate, up, act)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation of gelu."""
    return gated(gate, up, "gelu_tanh")


def activate(x: Tensor, act: str) -> Tensor:
    """act(x), for `act` one of ACTS."""
    return ACTS[act][0](x)


def turned(x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: int = 1) -> Tensor:
    """`rotate` by torch's operators: rotates the pairs (r, r + R/2) of each head by the tables' angles times `sign`."""
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    x1, x2, rest = x_BTHE.tensor_split((half, 2 * half), -1)
    if torch.compiler.is_compiling() or tangents_flow():
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)
    y_BTHE = torch.empty_like(x_BTHE)
    y1, y2, y_rest = y_BTHE.tensor_split((half, 2 * half), -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    y_rest.copy_(rest)
    return y_BTHE


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return turned(x_BTHE, cos_TR, sin_TR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return turned(grad, *ctx.saved_tensors, sign=-1), None, None


def rotate(x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Applies rotary positions to the first 2R dimensions of each head; tables are [T, R], in x's type."""
    if _nobody_asks(x_BTHE, cos_TR, sin_TR):
        return native.rotated(x_BTHE, cos_TR, sin_TR)
    return apply(_Rotate, x_BTHE, cos_TR, sin_TR)
