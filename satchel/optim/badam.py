"""BAdam: Adam on one layer at a time, every layer in its turn.

    for each layer in `order`: m = v = 0, then `period` steps of Adam on it, everything else frozen

Block coordinate descent whose subproblems are solved by a few steps of Adam. Gradients and moments are those of one
layer; the backward pass ends at that layer, so that the layers below keep no activations. Embeddings, final norm and
head do not train (nor do they by default in the authors' package). With rounding=fp32 and moments=fp32 the layer in
turn has its exact float32 master, as in the authors' package.

`period` is the paper's K: one round takes K L steps. The authors suggest the steps of an epoch over L, between 50 and
100; a run that is shorter than a round leaves some layers as they were. A layer is found by its name (`_sampler.py`).
The optimizer owns `requires_grad` of all parameters.
Paper: https://arxiv.org/abs/2404.02827
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from satchel.core.seams import Card
from satchel.optim._sampler import ORDERS, InTurns, Named, Sampler


@dataclass(frozen=True, kw_only=True)
class BAdam(InTurns):
    """Block-coordinate Adam."""

    card = Card(
        paper="https://arxiv.org/abs/2404.02827",
        saves=("gradients", "optimizer", "activations"),
        spends=("quality",),
        fidelity="approx",
        claim="Llama 3-8B tuned in 23.5 GB, above LoRA on MT-Bench and on par with Adam or better downstream",
        reference="badam",
        demo={"period": 2},
    )

    order: Literal["ascending", "descending", "random"] = "random"  # of the turns; random: another in each round

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.order in ORDERS, f"no order '{self.order}'; there is {', '.join(ORDERS)}")

    @property
    def sampler(self) -> Sampler:
        """What gives each layer its turn."""
        return Sampler(at_once=1, period=self.period, order=self.order)

    def outside(self, named_parameters: Named) -> list[tuple[str, nn.Parameter]]:
        """Nothing: it is frozen."""
        return []

    def together(self, sizes: Sequence[int], below: bool) -> list[frozenset[int]]:
        """One layer; nothing below it trains."""
        return self.sampler.together(sizes, below=False)
