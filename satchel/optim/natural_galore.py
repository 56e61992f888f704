"""Natural GaLore: GaLore whose low-rank gradient is first divided by the curvature of the last few.

    g = vec(L) [K];   H [S, K]: the last S of them, g among them;   g~ = (damping I + H^T H)^-1 g
      = H^T (damping I + H H^T)^-1 e,   e picking g: a system of S equations, Woodbury's identity without cancellation

and Adam runs on g~ in L's place. Everything else is GaLore's: see there for the subspace, its knobs and its limits.

Beside GaLore's state it keeps S K numbers in the gradient's dtype, where Adam keeps 2 K: "without additional memory",
the paper says; its code keeps S = 20. It spends two passes over H a step. H is emptied when the subspace changes, since
its coordinates mean nothing in the next; the authors' code keeps them, and projects from both sides, where the paper
and this file project from one.
Paper: https://arxiv.org/abs/2410.16029
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satchel.core.seams import Card
from satchel.native.operators import operator
from satchel.optim._shared import few_barriers, slices
from satchel.optim.galore import GaLore, GaLoreStepper

# S gradients that are kept, K elements of a low-rank gradient


@dataclass(frozen=True, kw_only=True)
class NaturalGaLore(GaLore):
    """GaLore with the inverse empirical Fisher matrix of a few low-rank gradients."""

    card = Card(
        paper="https://arxiv.org/abs/2410.16029",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="lower perplexity than GaLore's, pre-training models of 60M to 1.1B on C4",
        dial=("rank", 4, 1024),
        reference="galore-torch",
        demo={"rank": 4, "gap": 10},
    )

    history: int = 4  # low-rank gradients that make the curvature, 0 or more; 0: none, the authors' code keeps 20
    damping: float = 1e-3  # added to the curvature, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.history >= 0, f"history={self.history} is below 0; 4 doubles GaLore's moments")
        self.require(self.damping > 0, f"damping={self.damping} is not above 0; 1e-3 is usual")

    def stepper(self) -> type[NaturalStepper]:
        """The torch optimizer of this method."""
        return NaturalStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"history": self.history, "damping": self.damping}


class NaturalStepper(GaLoreStepper):
    """State of a projected matrix beside GaLore's: `history` [S, K]."""

    def low_step(self, low: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor:
        """GaLore's step on the natural gradient."""
        if self.due(state, group):
            state["history"] = torch.zeros(group["history"], low.numel(), dtype=low.dtype, device=low.device)
        natural = torch.empty(low.shape, dtype=torch.float32, device=low.device)
        since = (state["step"] - 1) % group["gap"]
        natural_(
            natural.view(-1), low.reshape(-1), state["history"], since % max(group["history"], 1), group["damping"]
        )
        return super().low_step(natural, p, state, group, seed)


@few_barriers()
def _natural_(out_K: Tensor, g_K: Tensor, history_SK: Tensor, place: int, damping: float) -> None:
    """out = (damping I + H^T H)^-1 g, once g stands in row `place` of the history H; g / damping without a history."""
    count = history_SK.shape[0]
    if not count:
        out_K.copy_(g_K).div_(damping)
        return
    history_SK[place].copy_(g_K)
    wide = torch.promote_types(g_K.dtype, torch.float32)
    gram_SS = damping * torch.eye(count, dtype=torch.float64, device=g_K.device)
    for cut in slices(g_K.numel(), g_K.device):
        part = history_SK[:, cut].to(wide)
        gram_SS += part @ part.T
    weight_S = torch.linalg.solve_ex(gram_SS, torch.eye(count, dtype=gram_SS.dtype, device=g_K.device)[place])[0]
    for cut in slices(g_K.numel(), g_K.device):
        out_K[cut].copy_(weight_S.to(wide) @ history_SK[:, cut].to(wide))


natural_ = operator(
    "natural_(Tensor(a!) out_K, Tensor g_K, Tensor(b!) history_SK, int place, float damping) -> ()",
    _natural_,
)
