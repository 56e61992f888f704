"""APOLLO-Mini: the gradient of each matrix itself, scaled by one number that AdamW finds in a subspace of rank one.

    L = G q^T;   s = |Adam(L)| / |L|;   W = (1 - lr * weight_decay) (W - lr * s G sqrt(scale))

As `apollo`, but with one scale for a matrix: state is 2 max(O, I) moments, hardly more than that of plain SGD. Adam's
step in R dimensions is shorter than in all by sqrt(R / min(O, I)), and so is s on average; `scale` = min(O, I) / R
makes it as long as AdamW's. The authors take 128 for every model: half of AdamW's steps at a width of 576, 1.4 times
them at 64. s is also a random number, the norm of one projection in its denominator: in models that narrow single
steps are up to three times the average, so take less there.
Paper: https://arxiv.org/abs/2412.05270
"""

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.optim.apollo import Apollo


@dataclass(frozen=True, kw_only=True)
class ApolloMini(Apollo):
    """Gradient scaling by tensors, approximated in a random subspace of rank one."""

    card = Card(
        paper="https://arxiv.org/abs/2412.05270",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="AdamW's perplexity or better, pre-training models up to 7B, with the memory of SGD",
        reference="apollo-torch",
        demo={"scale": 32.0},
    )

    rank: int = 1  # dimensions of the subspace, 1 or more
    scale: float = 128.0  # the root of this multiplies the step, above 0

    @property
    def granularity(self) -> str:
        """What has a scale of its own: each channel, or each tensor."""
        return "tensor"
