"""What the weight formats share: a linear map whose matrix exists only while it is multiplied by.

Backward makes the matrix anew from the packed buffers, so that a layer keeps nothing for it: not x, as the weight is
frozen, and not the matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from satchel.core.errors import ModelError
from satchel.model.tangent import apply

# O outputs, I inputs, G groups of a row

CHUNK = 2**18  # weights that are packed or unpacked at once: their temporaries stay in the cache


class Packed(nn.Module):
    """A frozen linear map in packed buffers. `bias` is None until it is set."""

    bias: Tensor | None  # [O]

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """`shape` is [O, I], `dtype` that of the matrix before it was packed."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.register_buffer("bias", None)

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        """Write the rows of the matrix into `out_OI`, which has the rows' shape and any float dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, [O, I]; in the dtype that it had before packing unless another is asked for."""
        device = next(self.buffers()).device
        weight_OI = torch.empty(self.out_features, self.in_features, dtype=dtype or self.dtype, device=device)
        for rows in row_chunks(weight_OI):
            self.unpack_(weight_OI[rows], rows)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O] in x's dtype."""
        return apply(_Multiply, x, self.bias, self) if torch.is_grad_enabled() else self.infer(x, self.bias)

    def infer(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """What `forward` computes where there are no gradients."""
        return self.multiply(x, bias_O)

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """What it computes where there are."""
        return functional.linear(x, self.dense(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_O: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.multiply(x, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        dx = dy @ ctx.packed.dense(dy.dtype) if needs_x else None
        return dx, dy.flatten(0, -2).sum(0) if needs_bias else None, None


def row_chunks(weight_OI: Tensor) -> list[slice]:
    """Slices over the rows, of about `CHUNK` weights each."""
    outputs, inputs = weight_OI.shape
    step = max(1, CHUNK // inputs)
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def require_groups(name: str, shape: Sequence[int], size: int) -> None:
    """Raise ModelError unless the groups of `size` fill each row of a matrix [O, I]."""
    outputs, inputs = shape
    if inputs % size:
        fit = [str(g) for g in range(16, min(inputs, 512) + 1, 2) if inputs % g == 0]
        cure = f"{', '.join(fit)} would" if fit else "no group would: leave this map out, or take int8"
        raise ModelError(
            f"{name}: groups of {size} do not fill the {inputs} inputs of a [{outputs}, {inputs}] matrix; {cure}"
        )


def round_up_bf16(scale: Tensor) -> Tensor:
    """The nearest bfloat16 that is no smaller, and above zero; positive float32 in."""
    bits = scale.clamp_min(1e-30).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)
