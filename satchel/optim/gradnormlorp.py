"""GradNormLoRP: GaLore on the directions of each matrix's rows, with Adam of their own for the rows' magnitudes.

    W [O, I] = m * V / |V|, row by row;   with D = V / |V|:  dm = sum_i D * G,   dV = G - D * dm   (V is W itself)
    m = (1 - lr * weight_decay) m - lr * Adam(dm)          V = W - lr * scale * Adam(Q^T dV) raised, as GaLore does
    W = m * V / |V|

A row's magnitude moves at full precision and speed, and the gradient that is projected has no part along the row, so
that the subspace is spent on directions alone. After each step V is W again: nothing of V is kept, its gradient has no
factor m / |V|. A row of zeros has no direction; it takes the projected step as it is.

State beside GaLore's: m and its two moments, 12 bytes a row. Spends two passes over W and G a step, in float32 slices;
`.grad` is used up. The paper's form for fine-tuning, where V is frozen and W = m * (V + B A) / |V + B A|, is the
adapter `dora` with the optimizer `galore` (of a rank below the adapter's). The authors' `wadamw.py` keeps full moments
and never writes direction times magnitude back; this is the algorithm of the paper.
Paper: https://arxiv.org/abs/2412.19616
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.optim._landing import keep
from satchel.optim._projected import move_rows
from satchel.optim._projector import find_basis, is_tall, lower, raised, row_parts
from satchel.optim._shared import adam_, few_barriers, gradient, master
from satchel.optim.galore import GaLore, GaLoreStepper

# O rows and I columns of a matrix, P rows of a part of it

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class GradNormLoRP(GaLore):
    """Weight-normalised low-rank projection of gradients."""

    card = Card(
        paper="https://arxiv.org/abs/2412.19616",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="89.5% less optimizer memory in 8 bits; RoBERTa's GLUE at rank 8: 80.65, LoRA's 79.23",
        dial=("rank", 4, 1024),
        demo={"rank": 4, "gap": 10},
    )

    def stepper(self) -> type[GradNormStepper]:
        """The torch optimizer of this method."""
        return GradNormStepper


class GradNormStepper(GaLoreStepper):
    """State of a projected matrix beside GaLore's: `magnitude` [O] in float32, and its two moments."""

    @few_barriers()
    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one matrix, in place."""
        if state["step"] == 1:
            state["magnitude"] = magnitudes(p, state)
            state.update((name, torch.zeros_like(state["magnitude"])) for name in ("magnitude_avg", "magnitude_avg_sq"))
        slope_O = condition_(gradient(p), p, state)
        if self.due(state, group):
            state["basis"] = find_basis(gradient(p), group["rank"], group["subspace"], seed)
        basis, tall = state["basis"], is_tall(p)
        undecayed, before_O = (
            group | {"weight_decay": 0.0},
            state["magnitude"].clone(),
        )  # it is the magnitude that decays
        step = self.low_step(lower(gradient(p), basis), p, state, undecayed, seed).to(p.dtype)
        self.step_magnitude(slope_O, state, group, seed)

        def step_of(part: slice) -> Tensor:
            to = state["magnitude"][part]
            return turned(rows_of(p, state, part), raised(step, basis, tall, part), before_O[part], to)

        move_rows(p, state, undecayed, seed, step_of)

    def step_magnitude(self, slope_O: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of AdamW on the magnitudes of a matrix's rows, in place."""
        unbias1, unbias2 = self.unbias(state, group)
        held, betas = [state["magnitude_avg"], state["magnitude_avg_sq"]], (group["beta1"], group["beta2"])
        eps, size = group["eps"] * unbias2, group["lr"] * unbias2 / unbias1
        adam_(state["magnitude"], slope_O, held, "fp32", "nearest", *betas, eps, size, keep(group), seed)


def rows_of(p: Tensor, state: dict[str, Any], part: slice) -> Tensor:
    """Some rows of a matrix in float32, with the low bits that are kept of them: its own memory if it is float32."""
    cut = slice(part.start * p.shape[1], part.stop * p.shape[1])
    return master(p.detach().view(-1)[cut], state["low"][cut] if "low" in state else None).view(-1, p.shape[1])


def magnitudes(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The norms of a matrix's rows, [O] in float32."""
    return torch.cat([torch.linalg.vector_norm(rows_of(p, state, part), dim=1) for part in row_parts(p)])


def condition_(g_OI: Tensor, p: Tensor, state: dict[str, Any]) -> Tensor:
    """Make the gradient of a matrix that of its directions, in place; what is left is the magnitudes', [O]."""
    slopes = []
    for part in row_parts(p):
        w_PI, g_PI = rows_of(p, state, part), g_OI[part].float()
        norm_P = torch.linalg.vector_norm(w_PI, dim=1).clamp_min_(TINY)
        slope_P = (w_PI * g_PI).sum(1).div_(norm_P)
        g_OI[part] = torch.addcmul(g_PI, w_PI, (slope_P / norm_P)[:, None], value=-1)
        slopes.append(slope_P * side(state["magnitude"][part]))
    return torch.cat(slopes)


def turned(w_PI: Tensor, step_PI: Tensor, before_P: Tensor, magnitude_P: Tensor) -> Tensor:
    """What moves rows by a step and to new magnitudes; rows that had none get the one that the step gives them."""
    v_PI = w_PI + step_PI
    norm_P = torch.linalg.vector_norm(v_PI, dim=1)
    magnitude_P.copy_(torch.where(before_P == 0, norm_P, magnitude_P))
    gain_P = magnitude_P * side(before_P) / norm_P.clamp_min_(TINY)
    return v_PI.mul_(gain_P[:, None]).sub_(w_PI)


def side(magnitude_P: Tensor) -> Tensor:
    """1, or -1 where a magnitude has passed zero: there W points against V."""
    return torch.where(magnitude_P < 0, -1.0, 1.0)
