"""Muon: the momentum of each hidden matrix, made orthogonal; AdamW for all else.

    m = b m + (1 - b) g        u = (1 - b) g + b m        U = NewtonSchulz(u): its singular vectors, values near 1
    W = (1 - lr * weight_decay) W - lr * scale * U

Hidden matrices are those of attention and feed-forward blocks; embeddings, head, norms and biases take AdamW with
beta1, beta2 and eps. `scaled=adamw` takes scale = 0.2 sqrt(max(O, I)), as large as AdamW's step, so that one
learning rate serves both; `scaled=original` takes sqrt(max(1, O / I)), which wants learning rates near 0.02.

State of a hidden matrix is one moment, where AdamW keeps two. It spends 5 iterations of three products in bfloat16 a
step, 4 min(O, I) / tokens of a forward pass each, and three bfloat16 copies of the matrix that is being moved.
Paper: https://arxiv.org/abs/2502.16982
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.native.operators import operator
from satchel.optim._landing import keep_average_, low_bits
from satchel.optim._projected import Projected, ProjectedStepper, move_rows
from satchel.optim._shared import STORES, few_barriers, gradient, slices, store_name, widen

# N elements of a flattened matrix; O outputs, I inputs

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: steepest at 0, values end between 0.7 and 1.2
ITERATIONS = 5
LEAST_NORM = 1e-7


@dataclass(frozen=True, kw_only=True)
class Muon(Projected):
    """Momentum, orthogonalised by Newton-Schulz iterations."""

    card = Card(
        paper="https://arxiv.org/abs/2502.16982",
        saves=("optimizer",),
        spends=("compute", "workspace", "quality"),
        fidelity="approx",
        claim="AdamW's loss with half of its compute, pre-training at the compute-optimal ratio",
        reference="torch",
    )

    momentum: float = 0.95  # decay of the hidden matrices' momentum, [0, 1)
    nesterov: bool = True  # look ahead along the momentum
    scaled: Literal["adamw", "original"] = "adamw"  # how a matrix's shape scales its learning rate

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.momentum < 1, f"momentum={self.momentum} is outside [0, 1); 0.95 is usual")
        self.require(self.scaled in ("adamw", "original"), f"no scaled '{self.scaled}'; there is adamw, original")

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """AdamW's, or that of the unscaled method."""
        return adamw if self.scaled == "adamw" else 0.02

    def stepper(self) -> type[MuonStepper]:
        """The torch optimizer of this method."""
        return MuonStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        own = {"momentum": self.momentum, "nesterov": self.nesterov, "scaled": self.scaled}
        return super().stepper_knobs() | own


class MuonStepper(ProjectedStepper):
    """State of a hidden matrix: `momentum`, flat."""

    def update_matrix(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one matrix, in place."""
        store = store_name(group["moments"], p)
        if state["step"] == 1:
            moment = STORES[store].zeros(p.numel(), p.device, signed=True)
            state.update({f"momentum{part}": tensor for part, tensor in moment.items()}, **low_bits(p, group))
        held = [state[name] for name in ("momentum", "momentum_scale") if name in state]
        u_OI = torch.empty(p.shape, dtype=torch.bfloat16, device=p.device)
        mix = group["momentum"]
        momentum_(u_OI.view(-1), gradient(p).view(-1), held, store, mix, group["nesterov"], seed)
        u_OI, size = orthogonal(u_OI), group["lr"] * shape_scale(p.shape, group["scaled"])
        move_rows(p, state, group, seed, lambda part: u_OI[part].float().mul_(-size))


def shape_scale(shape: torch.Size, scaled: str) -> float:
    """The factor on the learning rate of a matrix [O, I]."""
    return max(1, shape[0] / shape[1]) ** 0.5 if scaled == "original" else 0.2 * max(shape) ** 0.5


def orthogonal(u_OI: Tensor) -> Tensor:
    """Nearly U V^T of the matrix's singular value decomposition, in its own dtype; the matrix is used up."""
    a, b, c = QUINTIC
    tall = u_OI.shape[0] > u_OI.shape[1]
    x = u_OI.T if tall else u_OI
    x.div_(x.norm().clamp(min=LEAST_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@few_barriers()
def _momentum_(
    u_N: Tensor, g_N: Tensor, held: list[Tensor], store: str, momentum: float, nesterov: bool, seed: int
) -> None:
    """Move the momentum towards g, and write what it is, or its look-ahead, into u."""
    for cut in slices(u_N.numel(), u_N.device):
        g, m = widen(g_N[cut]), STORES[store].read(held, cut, True)
        m.lerp_(g, 1 - momentum)
        u_N[cut].copy_(g.lerp(m, momentum) if nesterov else m)
        keep_average_(store, held, cut, m, seed)


momentum_ = operator(
    "momentum_(Tensor(a!) u_N, Tensor g_N, Tensor(b!)[] held, str store, float momentum, bool nesterov, int seed) "
    "-> ()",
    _momentum_,
)
