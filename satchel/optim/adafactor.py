"""Adafactor: AdamW's scaling from the means of the squared gradient's rows and columns, without a first moment.

    d = t**-decay        r = (1 - d) r + d mean_I(g**2)        c = (1 - d) c + d mean_O(g**2)
    u = g / sqrt(r c / mean(r))        p = (1 - lr * weight_decay) p - lr * u / max(1, rms(u) / clip)

State of a matrix [O, I] is O + I numbers in float32, where AdamW keeps 2 O I; a vector keeps a full second moment. It
spends two more passes over the gradient. As torch's, lr is at most 1/sqrt(t). With `relative` steps are in units of the
parameter's root mean square (at least 1e-3), the paper's and torch's formula: it wants learning rates near 1e-2;
without, AdamW's learning rate serves. Without momentum, small batches are noisier than under AdamW.
Paper: https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from satchel.core.seams import Card
from satchel.native.operators import operator, walk
from satchel.optim._fused import Layerwise
from satchel.optim._landing import keep, low_bits, put_
from satchel.optim._shared import SLICE, SLICE_DEVICE, Stepper, decay_groups, few_barriers, gradient, master, widen

# B matrices of a parameter, one unless it has more than two dimensions; O rows, I columns

EPS = torch.finfo(torch.float32).eps  # least mean of r; its square is the least second moment
LEAST_SCALE = 1e-3  # of a parameter, where steps are relative


@dataclass(frozen=True, kw_only=True)
class Adafactor(Layerwise):
    """Factored second moments."""

    card = Card(
        paper="https://arxiv.org/abs/1804.04235",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="Adam's results on machine translation with sublinear memory",
        reference="torch",
    )

    decay: float = 0.8  # the second moment forgets step t with t^-decay, (0, 1]
    clip: float = 1.0  # largest root mean square of a matrix's step, in learning rates, [1, inf)
    relative: bool = False  # steps in units of the parameter's root mean square; try lr=1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.decay <= 1, f"decay={self.decay} is outside (0, 1]; 0.8 is usual")
        self.require(self.clip >= 1, f"clip={self.clip} is below 1; 1 is usual")

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> AdafactorStepper:
        """A torch optimizer over the parameters; see `AdafactorStepper`."""
        knobs = {name: value for name, value in self.knobs().items() if name not in ("weight_decay", "layerwise")}
        return self.within(AdafactorStepper)(decay_groups(named_parameters, self.weight_decay), lr, seed, **knobs)


class AdafactorStepper(Stepper):
    """State of [B, O, I]: `row` [B, O] and `column` [B, I], of a vector `column` alone; `low` if rounding is fp32."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of Adafactor on one parameter, in place."""
        x_BOI = p.detach().view(-1, *p.shape[-2:]) if p.ndim > 1 else p.detach().view(1, 1, -1)
        if state["step"] == 1:
            count, rows, columns = x_BOI.shape
            sizes = {"row": (count, rows)} if p.ndim > 1 else {}
            for name, size in (sizes | {"column": (count, columns)}).items():
                state[name] = torch.zeros(size, dtype=torch.float32, device=p.device)
            state.update(low_bits(p, group))
        adafactor_(
            x_BOI,
            gradient(p).view_as(x_BOI),
            state.get("row"),
            state["column"],
            state.get("low"),
            group["rounding"],
            state["step"] ** -group["decay"],
            min(group["lr"], state["step"] ** -0.5),
            group["clip"],
            group["relative"],
            keep(group),
            seed,
        )


@few_barriers()
def _adafactor_(
    x_BOI: Tensor,
    g_BOI: Tensor,
    row_BO: Tensor | None,
    column_BI: Tensor,
    low_N: Tensor | None,
    rounding: str,
    mix: float,
    size: float,
    clip: float,
    relative: bool,
    keep: float,
    seed: int,
) -> None:
    """One step: moments, then the root mean square of the step that they make, then the step."""
    low_BOI = None if low_N is None else low_N.view(x_BOI.shape)
    scale = _observe(x_BOI, g_BOI, low_BOI, row_BO, column_BI, mix)
    rows_BO = None if row_BO is None else row_BO / row_BO.mean(1, keepdim=True).clamp_(min=EPS)
    squares = (_direction(g_BOI, rows_BO, column_BI, part).square_().sum() for part in _parts(x_BOI))
    square = sum(squares, torch.zeros((), device=x_BOI.device))
    step = -size / ((square / x_BOI.numel()).sqrt_() / clip).clamp_(min=1)
    step = step * scale.clamp_(min=LEAST_SCALE) if relative else step
    start = 0
    for part in _parts(x_BOI):
        low = None if low_BOI is None else low_BOI[part]
        x = master(x_BOI[part], low).mul_(keep)
        x.add_(_direction(g_BOI, rows_BO, column_BI, part).mul_(step))
        put_(x_BOI[part], low, x, rounding, seed, slice(start, start + x.numel()))
        start += x.numel()


def _observe(
    x_BOI: Tensor, g_BOI: Tensor, low_BOI: Tensor | None, row_BO: Tensor | None, column_BI: Tensor, mix: float
) -> Tensor:
    """Move the moments towards the gradient's; the root mean square of the parameter."""
    means_BI, square = torch.zeros_like(column_BI), torch.zeros((), device=x_BOI.device)
    for number, rows in _parts(x_BOI):
        g = widen(g_BOI[number, rows]).square()
        means_BI[number] += g.sum(0) / x_BOI.shape[1]
        if row_BO is not None:
            row_BO[number, rows].lerp_(g.mean(1), mix)
        square += master(x_BOI[number, rows], None if low_BOI is None else low_BOI[number, rows]).square().sum()
    column_BI.lerp_(means_BI, mix)
    return (square / x_BOI.numel()).sqrt_()


def _direction(g_BOI: Tensor, rows_BO: Tensor | None, column_BI: Tensor, part: tuple[int, slice]) -> Tensor:
    """The scaled gradient of some rows, [n, I] in float32."""
    variance = column_BI[part[0]][None] if rows_BO is None else rows_BO[part][:, None] * column_BI[part[0]]
    return variance.clamp(min=EPS**2).rsqrt_() * widen(g_BOI[part])


def _parts(x_BOI: Tensor) -> Iterator[tuple[int, slice]]:
    """(matrix, rows) of bounded size; a row is never cut."""
    count, rows, columns = x_BOI.shape
    step = max(1, SLICE.get(x_BOI.device.type, SLICE_DEVICE) // columns)
    return ((number, slice(start, start + step)) for number in range(count) for start in walk(range(0, rows, step)))


adafactor_ = operator(
    "adafactor_(Tensor(a!) x_BOI, Tensor g_BOI, Tensor(b!)? row_BO, Tensor(c!) column_BI, Tensor(d!)? low_N, "
    "str rounding, float mix, float size, float clip, bool relative, float keep, int seed) -> ()",
    _adafactor_,
)
