"""What the members of Adam's family share: knobs, and the step of one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from satchel.optim._fused import Layerwise
from satchel.optim._landing import keep, low_bits
from satchel.optim._shared import Stepper, adam_, decay_groups, gradient, store_name, zero_moments

STEPPER_KNOBS = ("beta1", "beta2", "eps", "rounding", "moments")


@dataclass(frozen=True, kw_only=True)
class Adam(Layerwise):
    """Knobs of every Adam; a subclass has or fixes `moments`."""

    beta1: float = 0.9  # decay of the first moment, [0, 1)
    beta2: float = 0.999  # decay of the second moment, [0, 1)
    eps: float = 1e-8  # added to the root of the second moment, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.beta1 < 1, f"beta1={self.beta1} is outside [0, 1); 0.9 is usual")
        self.require(0 <= self.beta2 < 1, f"beta2={self.beta2} is outside [0, 1); 0.999 is usual")
        self.require(self.eps > 0, f"eps={self.eps} is not above 0; 1e-8 is usual")

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> AdamStepper:
        """A torch optimizer over the parameters; see `AdamStepper`."""
        groups = decay_groups(named_parameters, self.weight_decay)
        return self.within(AdamStepper)(groups, lr, seed, **self.stepper_knobs())

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return {name: getattr(self, name) for name in STEPPER_KNOBS}


class AdamStepper(Stepper):
    """State of a parameter of n elements: `step`, flat moments, and n int16 `low` bits where rounding is fp32."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step of Adam on one parameter, in place."""
        store = store_name(group["moments"], p)
        if state["step"] == 1:
            state.update(zero_moments(store, p.numel(), p.device), **low_bits(p, group))
        unbias1, unbias2 = self.unbias(state, group)
        adam_(
            p.detach().view(-1),
            gradient(p).view(-1),
            self.held(state, "low"),
            store,
            group["rounding"],
            group["beta1"],
            group["beta2"],
            group["eps"] * unbias2,
            group["lr"] * unbias2 / unbias1,
            keep(group),
            seed,
        )

    @staticmethod
    def held(state: dict[str, Any], *others: str) -> list[Tensor]:
        """The moments' tensors and those named, in the order of their names, whatever order they were loaded in."""
        return [state[name] for name in sorted(state) if name.startswith("exp_avg") or name in others]

    @staticmethod
    def unbias(state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float]:
        """What the first moment, and the root of the second, have been divided by too little for starting at zero."""
        return 1 - group["beta1"] ** state["step"], (1 - group["beta2"] ** state["step"]) ** 0.5
