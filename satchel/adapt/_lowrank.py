"""The arithmetic that the LoRA family shares: y + B(A(x)) without temporaries of x's or y's size.

`project` hands x on to the base map, so that its backward receives the base's gradient of x and adds its own share in
place; `expand` adds into the base's fresh output in place. Kept for the backward pass: x (which q, k and v share), and
[N, R]. Parameters may be of another dtype than x: they are cast on the way, their gradients come in their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from satchel.model.tangent import apply

# N tokens, I inputs, O outputs, R rank


def project(x_NI: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """(x, x @ down.T): x to be given to the base map, and nothing else; the second is [N, R]."""
    return apply(_Project, x_NI, down_RI)


def expand(y_NO: Tensor, h_NR: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """y + scale * h @ up.T, written into y, which must be fresh from an operator that does not need its output."""
    return apply(_Expand, y_NO, h_NR, up_OR, scale)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_NI, down_RI)
        ctx.set_materialize_grads(False)
        if not x_NI.requires_grad:
            ctx.mark_non_differentiable(x_NI)
        return x_NI, x_NI @ down_RI.to(x_NI.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_NI: Tensor | None, dh_NR: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x_NI, down_RI = ctx.saved_tensors
        if dh_NR is None:
            return dx_NI, None
        if ctx.needs_input_grad[0]:
            cast_RI = down_RI.to(dh_NR.dtype)
            dx_NI = dh_NR @ cast_RI if dx_NI is None else dx_NI.addmm_(dh_NR, cast_RI)
        ddown_RI = (dh_NR.T @ x_NI).to(down_RI.dtype) if ctx.needs_input_grad[1] else None
        return dx_NI, ddown_RI


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NO: Tensor, h_NR: Tensor, up_OR: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h_NR, up_OR)
        ctx.scale = scale
        ctx.mark_dirty(y_NO)
        return y_NO.addmm_(h_NR, up_OR.to(h_NR.dtype).T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        h_NR, up_OR = ctx.saved_tensors
        dh_NR = (dy_NO @ up_OR.to(dy_NO.dtype)).mul_(ctx.scale)
        dup_OR = (dy_NO.T @ h_NR).to(up_OR.dtype).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        return dy_NO, dh_NR, dup_OR, None
