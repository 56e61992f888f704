"""AdamW with both moments in 8 bits.

    m, v = decode(state);  an AdamW step in float32;  state = encode(m, v)

Blocks of 256 values share a float32 scale, and each value is the nearest of 256 codes: 2 bytes and 8/256 a parameter,
where AdamW takes 4 in bfloat16 and 8 in float32. Parameters below 4096 elements keep float32 moments. The update is
made before the moments are rounded, so that rounding reaches only later steps. Rounding in bfloat16 as in AdamW.
Paper: https://arxiv.org/abs/2110.02861
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.optim._adam import Adam


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Adam):
    """AdamW whose moments are quantised block by block."""

    card = Card(
        paper="https://arxiv.org/abs/2110.02861",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="32-bit Adam's results with a quarter of its state, without a change of hyper-parameters",
        reference="bitsandbytes",
    )

    @property
    def moments(self) -> str:
        """How the stepper keeps m and v."""
        return "8bit"
