"""LOMO: each parameter is updated within the backward pass, and its gradient freed at once.

    form=sgd    p = (1 - lr * weight_decay) p - lr * scale * g
    form=ada    Adafactor's step in units of the parameter's root mean square, with lr * scale (AdaLomo)

The gradients of a model are never alive together, only those of one block or so; sgd has no state, ada keeps O + I
numbers of a matrix. Where the job clips, the loss is computed twice a step, the first time for the norm of all
gradients (the authors' `clip_grad_norm` does so, too): clip=0 saves a half of the time, and ada, which limits each
matrix's step, does without. A failure within the backward pass ends the run: the step cannot be computed again.

`scale` turns AdamW's learning rates into those that the papers train with: 0.03 for sgd, 1e-3 for ada, at lr=1e-4.
Paper: https://arxiv.org/abs/2306.09782; form=ada: https://arxiv.org/abs/2310.10195
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from satchel.core.seams import Card
from satchel.optim._fused import FusedStepper
from satchel.optim._landing import Landing, keep, low_bits
from satchel.optim._shared import Stepper, decay_groups, gradient, move_, slices
from satchel.optim.adafactor import AdafactorStepper

SCALE = {"sgd": 300.0, "ada": 10.0}


@dataclass(frozen=True, kw_only=True)
class Lomo(Landing):
    """Gradient descent or Adafactor, fused with the backward pass."""

    card = Card(
        paper="https://arxiv.org/abs/2306.09782",
        saves=("gradients", "optimizer"),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="all parameters of a 65B model on eight 24 GB GPUs; 10.8% of the memory of the usual way",
        reference="lomo-optim",
        demo={"scale": 20.0},
    )

    form: Literal["sgd", "ada"] = "sgd"  # gradient descent, or AdaLomo
    scale: float = 0.0  # factor on the learning rate, [0, inf); 0 is 300 for sgd and 10 for ada

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.form in SCALE, f"no form '{self.form}'; there is {', '.join(SCALE)}")
        self.require(self.scale >= 0, f"scale={self.scale} is below 0; 0 takes what suits the form")

    @property
    def undivided(self) -> bool:
        """See `OptimizerMethod`."""
        return True

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> FusedStepper:
        """A torch optimizer whose step wants a closure; see `FusedStepper`."""
        groups = decay_groups(named_parameters, self.weight_decay)
        knobs = {"rounding": self.rounding, "scale": self.scale or SCALE[self.form]}
        if self.form == "sgd":
            return LomoStepper(groups, lr, seed, **knobs)
        return AdaLomoStepper(groups, lr, seed, **knobs, decay=0.8, clip=1.0, relative=True)


class LomoStepper(FusedStepper, Stepper):
    """State of a parameter: `step`, and n int16 `low` bits where rounding is fp32."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of gradient descent on one parameter, in place."""
        if state["step"] == 1:
            state.update(low_bits(p, group))
        flat, g, low, size = p.detach().view(-1), gradient(p).view(-1), state.get("low"), group["lr"] * group["scale"]
        for number, cut in enumerate(slices(p.numel(), p.device)):
            step = g[cut].float() * -size
            move_(flat[cut], step, None if low is None else low[cut], group["rounding"], keep(group), seed + number)


class AdaLomoStepper(FusedStepper, AdafactorStepper):
    """State as Adafactor's."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of Adafactor on one parameter, in place."""
        super().update(p, state, group | {"lr": group["lr"] * group["scale"]}, seed)
