"""LoRA that tunes the direction and the length of each of the matrix's rows apart.

    y = m / n * (W x + scale * B A x) + bias        n = the row norms of W + scale * B A, m [O] starts at those of W
    n^2 = |W|^2 + 2 scale <B, W A'> + scale^2 <B A, B A>, row by row: W + scale * B A is never built

Saves and spends what LoRA does, and compute: R tokens more through the base, two passes over y, and y kept for the
backward pass (attention and gated feed-forwards keep theirs anyway). n carries no gradient (section 4.3 of the paper).
Limits: must stand nearest to the map; with `dropout`, only the input of A is dropped, not that of W.
Paper: https://arxiv.org/abs/2402.09353
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from satchel.adapt.lora import Lora, LowRank
from satchel.core.seams import Card
from satchel.model.adapters import Adapted
from satchel.model.linear import dense_OI
from satchel.model.tangent import apply

# N tokens, I inputs, O outputs, R rank


class Decomposed(LowRank):
    """A `LowRank` with a magnitude for each output."""

    square_O: Tensor  # squared row norms of W

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, rng: torch.Generator | None) -> None:
        super().__init__(base, rank, scale, dropout, rng)
        norm_O = torch.linalg.vector_norm(dense_OI(base), dim=1, dtype=torch.float32)
        self.m_O = nn.Parameter(norm_O.clone())
        self.register_buffer("square_O", norm_O.square_(), persistent=False)

    def forward(self, x_NI: Tensor, base: nn.Module) -> Tensor:
        """The adapted map's output, [N, O]."""
        y_NO, h_NR = self.branches(x_NI, base)
        gain_O = self.m_O / self.norm(base).to(self.m_O.dtype)
        return apply(_Scale, y_NO, h_NR, self.B_OR, self.scale, gain_O, getattr(base, "bias", None))

    @torch.no_grad()
    def norm(self, base: nn.Module) -> Tensor:
        """Row norms of W + scale * B A, [O] in float32 or wider."""
        weight_OI, up_OR = dense_OI(base), self.B_OR.to(torch.promote_types(self.B_OR.dtype, torch.float32))
        down_RI = self.A_RI.to(weight_OI.dtype)
        cross_OR = (down_RI @ weight_OI.T).T.to(up_OR.dtype)
        down_RI = down_RI.to(up_OR.dtype)
        change_O = (up_OR * (2 * self.scale * cross_OR + self.scale**2 * (up_OR @ (down_RI @ down_RI.T)))).sum(1)
        return (self.square_O + change_O).clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


class _Scale(torch.autograd.Function):
    """gain * (y + scale * h @ up.T) with y's bias left out of the scaling; written into y, which it keeps."""

    @staticmethod
    def forward(
        ctx: Any, y_NO: Tensor, h_NR: Tensor, up_OR: Tensor, scale: float, gain_O: Tensor, bias_O: Any
    ) -> Tensor:
        ctx.scale, ctx.bias_O = scale, bias_O
        ctx.mark_dirty(y_NO)
        y_NO.addmm_(h_NR, up_OR.to(h_NR.dtype).T, alpha=scale).mul_(gain_O.to(y_NO.dtype))
        if bias_O is not None:
            y_NO.add_(((1 - gain_O) * bias_O).to(y_NO.dtype))
        ctx.save_for_backward(y_NO, h_NR, up_OR, gain_O)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        y_NO, h_NR, up_OR, gain_O = ctx.saved_tensors
        dgain_O = (dy_NO * y_NO).sum(0, dtype=gain_O.dtype)
        if ctx.bias_O is not None:
            dgain_O -= ctx.bias_O * dy_NO.sum(0, dtype=gain_O.dtype)
        dv_NO = dy_NO * gain_O.to(dy_NO.dtype)
        dh_NR = (dv_NO @ up_OR.to(dv_NO.dtype)).mul_(ctx.scale)
        dup_OR = (dv_NO.T @ h_NR).to(up_OR.dtype).mul_(ctx.scale)
        dgain_O = torch.where(gain_O == 0, 0, dgain_O / gain_O)  # a row that is zero stays so
        return dv_NO, dh_NR, dup_OR, None, dgain_O, None


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """Weight-decomposed LoRA: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2402.09353",
        saves=("gradients", "optimizer"),
        spends=("adapter", "activations", "compute", "quality"),
        fidelity="approx",
        claim="Llama 7B: 78.4 against LoRA's 74.7 over eight commonsense tasks; half the rank still gives 77.5",
        dial=("rank", 1, 256),
        reference="peft",
        demo={"rank": 4},
    )

    def attach(self, path: str, base: nn.Module, rng: torch.Generator | None) -> nn.Module:
        """A `Decomposed` for the map at `path`. Raises UserError if the map has another adapter already."""
        self.require(
            not isinstance(base, Adapted), f"{path} has an adapter already; attach dora first, the other after it"
        )
        return Decomposed(base, self.rank, self.scale, self.dropout, rng)

    def delta(self, module: Decomposed, base: nn.Module) -> Tensor:
        """m / n * (W + scale * B A) - W, [O, I] in float32."""
        weight_OI = dense_OI(base).float()
        tuned_OI = weight_OI + module.product()
        gain_O = module.m_O.detach().float() / torch.linalg.vector_norm(tuned_OI, dim=1)
        return tuned_OI.mul_(gain_O.unsqueeze(1)).sub_(weight_OI)
