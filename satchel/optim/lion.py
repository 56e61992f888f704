"""Lion: every element moves by the same amount, in the direction of a blend of its momentum and its gradient.

    p = (1 - lr * weight_decay) p - lr * scale * sign(b1 m + (1 - b1) g)        m = b2 m + (1 - b2) g

State is one moment where AdamW has two: 2 bytes a parameter in bfloat16, 1 and 4/256 with `moments=8bit`. A step of
signs is larger than AdamW's, so the paper divides AdamW's learning rate by 3 to 10 and multiplies its decay by as much.
`scale` does that here: the job's learning rate and decay stay those of AdamW; scale=1 is the paper's own formula.
A momentum in bfloat16 is rounded stochastically: it moves by a hundredth of itself a step, near bfloat16's precision.
Paper: https://arxiv.org/abs/2302.06675
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from satchel.core.seams import Card
from satchel.native.operators import operator
from satchel.optim._fused import Layerwise
from satchel.optim._landing import keep, keep_average_, low_bits, put_
from satchel.optim._shared import (
    STORES,
    Stepper,
    decay_groups,
    few_barriers,
    gradient,
    master,
    slices,
    store_name,
    widen,
)

# N elements of a flattened parameter


@dataclass(frozen=True, kw_only=True)
class Lion(Layerwise):
    """Sign descent along an interpolated momentum."""

    card = Card(
        paper="https://arxiv.org/abs/2302.06675",
        saves=("optimizer",),
        spends=("quality",),
        fidelity="approx",
        claim="same or better quality than AdamW on image and language models up to 7.5B, with one moment",
        reference="lion-pytorch",
    )

    beta1: float = 0.9  # share of the momentum in the direction, [0, 1)
    beta2: float = 0.99  # decay of the momentum, [0, 1)
    scale: float = 0.2  # factor on the learning rate, above 0; 1 is the paper's formula
    moments: Literal["follow", "fp32", "bf16", "8bit"] = "follow"  # storage of m; follow: the parameter's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.beta1 < 1, f"beta1={self.beta1} is outside [0, 1); 0.9 is usual")
        self.require(0 <= self.beta2 < 1, f"beta2={self.beta2} is outside [0, 1); 0.99 is usual")
        self.require(self.scale > 0, f"scale={self.scale} is not above 0; 0.1 to 0.3 suits AdamW's learning rates")
        known = ("follow", *STORES)
        self.require(self.moments in known, f"no moments '{self.moments}'; there is {', '.join(known)}")

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """A fifth of AdamW's where `scale` does not see to that."""
        return 0.2 / self.scale * adamw

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> LionStepper:
        """A torch optimizer over the parameters; see `LionStepper`."""
        knobs = {name: value for name, value in self.knobs().items() if name not in ("weight_decay", "layerwise")}
        return self.within(LionStepper)(decay_groups(named_parameters, self.weight_decay), lr, seed, **knobs)


class LionStepper(Stepper):
    """State of a parameter of n elements: `step`, a flat moment, and n int16 `low` bits where rounding is fp32."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of Lion on one parameter, in place."""
        store = store_name(group["moments"], p)
        if state["step"] == 1:
            moment = STORES[store].zeros(p.numel(), p.device, signed=True)
            state.update({f"exp_avg{part}": tensor for part, tensor in moment.items()}, **low_bits(p, group))
        lion_(
            p.detach().view(-1),
            gradient(p).view(-1),
            [state[name] for name in ("exp_avg", "exp_avg_scale") if name in state],
            state.get("low"),
            store,
            group["rounding"],
            group["beta1"],
            group["beta2"],
            group["lr"] * group["scale"],
            keep(group),
            seed,
        )


@few_barriers()
def _lion_(
    x_N: Tensor,
    g_N: Tensor,
    held: list[Tensor],
    low_N: Tensor | None,
    store: str,
    rounding: str,
    beta1: float,
    beta2: float,
    size: float,
    keep: float,
    seed: int,
) -> None:
    """One step of Lion: x = keep * x - size * sign(beta1 m + (1 - beta1) g), with m then moved towards g."""
    for cut in slices(x_N.numel(), x_N.device):
        g, low = widen(g_N[cut]), None if low_N is None else low_N[cut]
        m = STORES[store].read(held, cut, True)
        x = master(x_N[cut], low).mul_(keep)
        x.add_(m.mul(beta1).add_(g, alpha=1 - beta1).sign_(), alpha=-size)
        put_(x_N[cut], low, x, rounding, seed, cut)
        keep_average_(store, held, cut, m.mul_(beta2).add_(g, alpha=1 - beta2), seed)


lion_ = operator(
    "lion_(Tensor(a!) x_N, Tensor g_N, Tensor(b!)[] held, Tensor(c!)? low_N, str store, str rounding, float beta1, "
    "float beta2, float size, float keep, int seed) -> ()",
    _lion_,
)
