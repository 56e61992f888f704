"""AdamW: Adam with decoupled weight decay, for float32 and bfloat16 parameters.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g**2
    p = (1 - lr * weight_decay) p - lr * (m / (1 - b1**t)) / (sqrt(v / (1 - b2**t)) + eps)

A bfloat16 parameter would lose most updates of fine-tuning to rounding. `rounding` says how they land:

    stochastic   right on average; no further bytes                               6 bytes of state, weight included
    fp32         exactly as a float32 master, of which 16 bits lie in the state   8 bytes
    nearest      plain bfloat16, for comparison: it falls behind                  6 bytes

and `moments` how m and v are kept: `follow` is the parameter's dtype (4 bytes a parameter in bfloat16, v rounded
stochastically), `fp32` takes 8. Temporaries are a few slices of 512 KiB. Matrices decay; norms and biases do not.
Paper: https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from satchel.core.seams import Card, OptimizerMethod
from satchel.optim._shared import ROUNDINGS, Stepper, adam_, decay_groups, store_name, zero_moments


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerMethod):
    """AdamW whose state and rounding are chosen for the parameters' dtype."""

    card = Card(
        paper="https://arxiv.org/abs/1711.05101",
        spends=("optimizer",),
        fidelity="exact",
        claim="decoupled decay generalises better than L2 regularisation in Adam",
        reference="torch",
    )

    beta1: float = 0.9  # decay of the first moment, [0, 1)
    beta2: float = 0.999  # decay of the second moment, [0, 1)
    eps: float = 1e-8  # added to the root of the second moment, above 0
    weight_decay: float = 0.0  # share of a matrix that a step at lr=1 takes away, [0, 1]
    rounding: Literal["stochastic", "fp32", "nearest"] = "stochastic"  # how an update lands in bf16
    moments: Literal["follow", "fp32", "bf16"] = "follow"  # their dtype; follow: the parameter's

    def __post_init__(self) -> None:
        self.require(0 <= self.beta1 < 1, f"beta1={self.beta1} is outside [0, 1); 0.9 is usual")
        self.require(0 <= self.beta2 < 1, f"beta2={self.beta2} is outside [0, 1); 0.999 is usual")
        self.require(self.eps > 0, f"eps={self.eps} is not above 0; 1e-8 is usual")
        self.require(0 <= self.weight_decay <= 1, f"weight_decay={self.weight_decay} is outside [0, 1]; try 0.01")
        self.require(self.rounding in ROUNDINGS, f"no rounding '{self.rounding}'; there is {', '.join(ROUNDINGS)}")
        self.require(self.moments in ("follow", "fp32", "bf16"), f"no moments '{self.moments}'; try follow, fp32, bf16")

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> AdamStepper:
        """A torch optimizer over the parameters; see `AdamStepper`."""
        groups = decay_groups(named_parameters, self.weight_decay)
        return AdamStepper(groups, lr, seed, **{k: v for k, v in self.knobs().items() if k != "weight_decay"})


class AdamStepper(Stepper):
    """State of a parameter of n elements: `step`, flat moments, and n int16 `low` bits where rounding is fp32."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of Adam on one parameter, in place."""
        store = store_name(group["moments"], p)
        if state["step"] == 1:
            state.update(self.fresh(p, store, group["rounding"]))
        unbias1, unbias2 = 1 - group["beta1"] ** state["step"], (1 - group["beta2"] ** state["step"]) ** 0.5
        adam_(
            p.detach().view(-1),
            p.grad.view(-1),
            [value for value in state.values() if isinstance(value, Tensor)],
            store,
            group["rounding"],
            group["beta1"],
            group["beta2"],
            group["eps"] * unbias2,
            group["lr"] * unbias2 / unbias1,
            1 - group["lr"] * group["weight_decay"],
            seed,
        )

    @staticmethod
    def fresh(p: Tensor, store: str, rounding: str) -> dict[str, Tensor]:
        """The tensors of a parameter's state before its first step."""
        state = zero_moments(store, p.numel(), p.device)
        if rounding == "fp32" and p.dtype != torch.float32:
            state["low"] = torch.zeros(p.numel(), dtype=torch.int16, device=p.device)
        return state
