"""LISA: AdamW on a few layers at a time, drawn at random, and on all that lies outside of the layers.

    every `period` steps: `gamma` of the L layers are drawn, all alike; the others are frozen and lose their moments
    p = AdamW(p) for the drawn layers, embeddings, final norm and head

Saves gradients, moments and the activations that only a weight's gradient needs, of L - gamma layers. What lies outside
of the layers trains at every step, and makes most of the state in small models: of SmolLM2-135M's parameters the
embedding alone is a fifth. gamma >= L is AdamW. A layer is found by its name (`_sampler.py`). Between steps the
optimizer owns `requires_grad` of the layers.

Moments that begin anew after each draw take their first steps with bias correction, as at the start of a run; the
schedule goes on. The authors' code draws 1 or 2 layers every 3 to 50 steps.
Paper: https://arxiv.org/abs/2403.17919
"""

from __future__ import annotations

from dataclasses import dataclass

from satchel.core.seams import Card
from satchel.optim._sampler import InTurns, Sampler


@dataclass(frozen=True, kw_only=True)
class Lisa(InTurns):
    """Layerwise importance sampling around AdamW."""

    card = Card(
        paper="https://arxiv.org/abs/2403.17919",
        saves=("gradients", "optimizer", "activations"),
        spends=("quality",),
        fidelity="approx",
        claim="11% to 37% above LoRA on MT-Bench at no more memory; Llama-2-70B on par with it or better",
        dial=("gamma", 1, 128),
        demo={"gamma": 1, "period": 2},
    )

    gamma: int = 2  # layers that train at once, 1 or more

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.gamma >= 1, f"gamma={self.gamma} is below 1; 2 to 4 layers at once are usual")

    @property
    def sampler(self) -> Sampler:
        """What draws the layers."""
        return Sampler(at_once=self.gamma, period=self.period)
