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

from dataclasses import dataclass
from typing import Literal

from satchel.core.seams import Card
from satchel.optim._adam import Adam

MOMENTS = ("follow", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """AdamW whose state and rounding are chosen for the parameters' dtype."""

    card = Card(
        paper="https://arxiv.org/abs/1711.05101",
        spends=("optimizer",),
        fidelity="exact",
        claim="decoupled decay generalises better than L2 regularisation in Adam",
        reference="torch",
    )

    moments: Literal["follow", "fp32", "bf16"] = "follow"  # their dtype; follow: the parameter's

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.moments in MOMENTS, f"no moments '{self.moments}'; there is {', '.join(MOMENTS)}")
