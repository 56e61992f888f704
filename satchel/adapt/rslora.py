"""LoRA whose strength does not fade with its rank: scale = alpha / sqrt(rank) instead of alpha / rank.

Saves and spends what LoRA does; the gradient keeps its size at rank 64 and above, where LoRA's vanishes.
Paper: https://arxiv.org/abs/2312.03732
"""

import math
from dataclasses import dataclass

from satchel.adapt.lora import Lora
from satchel.core.seams import Card


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """Rank-stabilised LoRA: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2312.03732",
        saves=("gradients", "optimizer"),
        spends=("adapter", "quality"),
        fidelity="approx",
        claim="Llama 2 7B on OpenOrca: perplexity falls with every rank from 4 to 2048, while LoRA's stays where it is",
        dial=("rank", 1, 1024),
        reference="peft",
        demo={"rank": 4},
    )

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / math.sqrt(self.rank)
