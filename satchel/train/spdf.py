"""Sparse pre-training, dense fine-tuning: train a random part of the weights from the start, and all of them later.

    W = scatter(values, index)      index: a random (1 - sparsity) of each matrix's places, drawn once
    dvalues = (dy^T x)[index]

The matrices of attention and feed-forward are masked, each in the same share; embeddings, norms, biases and head stay
dense. Only the kept weights exist: gradients and the optimizer's state are (1 - sparsity) of the dense ones. What is
written at the end is the dense model with zeros in it: any later run trains them too, which is the dense fine-tuning.
`mask=zeros` keeps that model sparse instead: it leaves out what is zero.
Saves gradients and optimizer state, and weights from a sparsity of 2/3 on (an index takes 4 bytes); spends compute on
making the matrix in each pass. No arithmetic is saved: a processor without sparse kernels multiplies by the zeros.
Values are vectors: an optimizer that projects matrices finds none, and weight decay leaves them alone.
Paper: https://arxiv.org/abs/2303.10464
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from satchel.core.seams import Card, Surgery
from satchel.model.linear import dense_OI, linears, swap

# N tokens, I inputs, O outputs, P kept weights


class MaskedLinear(nn.Module):
    """A linear map of whose matrix only some weights exist; the others are zero."""

    index_P: Tensor  # int32, rising: places of the kept weights in the matrix, row by row

    def __init__(self, weight_OI: Tensor, index_P: Tensor, bias_O: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("index_P", index_P.to(torch.int32))
        self.values_P = nn.Parameter(weight_OI.flatten().index_select(0, self.index_P))
        self.bias = bias_O

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.values_P.dtype

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The matrix, [O, I]."""
        weight = self.values_P.new_zeros(self.out_features * self.in_features)
        return weight.index_add_(0, self.index_P, self.values_P).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        y = _Multiply.apply(x, self.values_P, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        share = self.values_P.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={share:.3f}"


class _Multiply(torch.autograd.Function):
    """x @ W.T; backward makes the matrix anew, so that a layer keeps no copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values_P: Tensor, masked: MaskedLinear) -> Tensor:
        ctx.masked = masked
        ctx.save_for_backward(x)
        return functional.linear(x, masked.dense())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        needs_x, needs_values, _ = ctx.needs_input_grad
        dx = dy @ ctx.masked.dense() if needs_x else None
        if not needs_values:
            return dx, None, None
        dweight_OI = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, dweight_OI.flatten().index_select(0, ctx.masked.index_P), None


@dataclass(frozen=True, kw_only=True)
class SPDF(Surgery):
    """A static random mask over the matrices of the blocks."""

    card = Card(
        paper="https://arxiv.org/abs/2303.10464",
        saves=("gradients", "optimizer"),
        spends=("compute", "quality"),
        fidelity="study",
        claim="75% sparsity at 1.3B parameters: 2.5 times fewer operations of pre-training, no loss downstream",
        dial=("sparsity", 0.9, 0.0),
        demo={"sparsity": 0.5},
    )

    sparsity: float = 0.5  # share of each matrix's weights that is left out, [0, 1)
    mask: Literal["random", "zeros"] = "random"  # what is left out: drawn, or what is zero already

    def __post_init__(self) -> None:
        self.require(0 <= self.sparsity < 1, f"sparsity={self.sparsity} is outside [0, 1); 0.75 leaves a quarter")

    def operate(self, model: nn.Module, rng: torch.Generator) -> None:
        """Put a `MaskedLinear` in the place of every matrix of the blocks."""
        for path, module in linears(model).items():
            weight_OI = dense_OI(module)
            index_P = self._kept(weight_OI, rng).to(weight_OI.device)
            swap(model, path, MaskedLinear(weight_OI, index_P, getattr(module, "bias", None)))

    def _kept(self, weight_OI: Tensor, rng: torch.Generator) -> Tensor:
        """Places of the weights that stay, rising."""
        kept = round((1 - self.sparsity) * weight_OI.numel())
        mask = _weights_first(weight_OI.flatten() != 0, kept) if self.mask == "zeros" else self._drawn(weight_OI, rng)
        return torch.nonzero_static(mask, size=kept).flatten().to(torch.int32)

    def _drawn(self, weight_OI: Tensor, rng: torch.Generator) -> Tensor:
        count = weight_OI.numel()
        order = torch.randperm(count, generator=rng, dtype=torch.int32)[: round((1 - self.sparsity) * count)]
        mask = torch.zeros(count, dtype=torch.uint8)
        return mask.index_add_(0, order, torch.ones_like(order, dtype=torch.uint8))


def _weights_first(there: Tensor, kept: int) -> Tensor:
    """A mask of `kept` places: those that are there, from the first on, and others only if these are fewer."""
    number = there.cumsum(0, dtype=torch.int32)
    other = (~there).cumsum(0, dtype=torch.int32)
    return (there & (number <= kept)) | (~there & (other <= kept - number[-1]))
