"""OwLore: GaLore on a few layers at a time, drawn in proportion to their outliers, and on all outside of the layers.

    A[o, i] = |W[o, i]| * |x[i]|_2, the norm over the tokens of the first step
    outliers of a layer: the share of entries with A > threshold * mean(A), averaged over its linear maps
    every `period` steps `gamma` layers are drawn without replacement by these; they train as under GaLore

`mode=owl-reverse` prefers layers with few outliers (the largest share less their own), `weight-norm` those whose
matrices are large, `uniform` none (LISA with GaLore). The share is counted once, before the first step: a forward pass
of its batch, whose inputs to the layers' linear maps a hook reads; so `owl` needs `step(closure)`, and calls it once
without grad mode. Layers without any outlier are drawn after all others.

Saves what LISA does and most of the drawn layers' moments, whose subspace is found anew after each draw. What lies
outside of the layers takes AdamW at every step, so that embeddings make most of the state in small models:
`moments=8bit` quarters it in float32, halves it in bfloat16. The authors' code reads shares of 128 documents from a
file, of threshold 13, and trains Llama-2-7B with gamma=5, period=50 and rank=256.
Paper: https://arxiv.org/abs/2405.18380
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from satchel.core.errors import UserError
from satchel.core.seams import Card
from satchel.optim._fused import FusedStepper
from satchel.optim._projected import ProjectedStepper
from satchel.optim._projector import row_parts
from satchel.optim._sampler import Named, SampledStepper, Sampler, blocks_of
from satchel.optim.galore import GaLore, GaLoreStepper

# N tokens, O outputs and I inputs of a linear map

MODES = ("owl", "owl-reverse", "weight-norm", "uniform")


@dataclass(frozen=True, kw_only=True)
class OwLore(GaLore):
    """Outlier-weighed layer sampling around GaLore."""

    card = Card(
        paper="https://arxiv.org/abs/2405.18380",
        saves=("gradients", "optimizer", "activations"),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="up to 1.1% above full tuning on commonsense reasoning; Llama-2-7B in 21 GB",
        dial=("rank", 4, 1024),
        reference="galore-torch",
        demo={"rank": 4, "gap": 10, "gamma": 1, "period": 2},
    )

    scale: float = 1.0  # factor on the projected matrices' learning rate, above 0
    gamma: int = 2  # layers that train at once, 1 or more
    period: int = 20  # optimizer steps between two draws, 1 or more
    mode: Literal["owl", "owl-reverse", "weight-norm", "uniform"] = "owl"  # what makes a layer likely to be drawn
    threshold: float = 13.0  # an outlier is this many times the mean, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.gamma >= 1, f"gamma={self.gamma} is below 1; 2 to 5 layers at once are usual")
        self.require(self.period >= 1, f"period={self.period} is below 1; 20 to 50 steps are usual")
        self.require(self.mode in MODES, f"no mode '{self.mode}'; there is {', '.join(MODES)}")
        self.require(self.threshold > 0, f"threshold={self.threshold} is not above 0; 13 is usual")

    @property
    def sampler(self) -> Sampler:
        """What draws the layers."""
        return Sampler(at_once=self.gamma, period=self.period)

    def build(self, named_parameters: Named, lr: float, seed: int) -> ProjectedStepper:
        """A torch optimizer over the parameters. Raises UserError if none is a layer's, or nothing is projected."""
        optimizer, blocks = super().build(named_parameters, lr, seed), blocks_of(named_parameters)
        assert isinstance(optimizer, OwLoreStepper)
        by_norm = self.mode == "weight-norm" and self.gamma < len(blocks)
        optimizer.sample(blocks, self.sampler, [weight_norm(block) for block in blocks] if by_norm else [])
        return optimizer

    def stepper(self) -> type[OwLoreStepper]:
        """The torch optimizer of this method."""
        return LayerwiseOwLoreStepper if self.layerwise else OwLoreStepper

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return super().stepper_knobs() | {"mode": self.mode, "threshold": self.threshold}

    def together(self, sizes: Sequence[int], below: bool) -> list[frozenset[int]]:
        """As many of the layers as are drawn."""
        return self.sampler.together(sizes, below)


class OwLoreStepper(SampledStepper, GaLoreStepper):
    """State as GaLore's, of what trains now; the layers' weights lie in the groups."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        """One optimizer step; before the first, the layers are weighed. Raises UserError if that takes a closure."""
        group = self.param_groups[0]
        if group["mode"].startswith("owl") and not group["weights"] and self.sampler.at_once < len(self.blocks):
            self.keep_in_groups(weights=self.weigh(closure, group["threshold"], group["mode"] == "owl-reverse"))
            self.switch()
        return super().step(closure)

    def weigh(self, closure: Callable[[], Tensor] | None, threshold: float, reverse: bool) -> list[float]:
        """The layers' shares of outliers on the inputs of one forward pass."""
        if closure is None:
            raise UserError("owlore: mode=owl reads what goes into the layers: call step(closure), or set mode=uniform")
        matrices = [[p for p in block if p.ndim == 2] for block in self.blocks]
        with inputs_of(chain.from_iterable(matrices)) as square:
            closure()
        if not square:
            raise UserError("owlore: mode=owl saw no torch.nn.Linear of a layer at work; set mode=uniform")
        seen = [[p for p in block if id(p) in square] for block in matrices]
        shares = [mean([outlier_share(p, square[id(p)].sqrt(), threshold) for p in block]) for block in seen]
        return [max(shares) - share for share in shares] if reverse else shares


class LayerwiseOwLoreStepper(OwLoreStepper, FusedStepper, GaLoreStepper):
    """OwLore within the backward pass. GaLore comes last: torch gives a class that was built once its own `step`."""


@contextmanager
def inputs_of(matrices: Iterable[Tensor]) -> Iterator[dict[int, Tensor]]:
    """While open, sums up the squares [I] of whatever a torch.nn.Linear multiplies each matrix with, by its id."""
    wanted, square = {id(p) for p in matrices}, {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear) and id(module.weight) in wanted and inputs:
            norm_I = torch.linalg.vector_norm(inputs[0].flatten(0, -2), dim=0, dtype=torch.float32)
            square[id(module.weight)] = square.get(id(module.weight), 0) + norm_I.square_()

    hook = register_module_forward_pre_hook(look)
    try:
        yield square
    finally:
        hook.remove()


def outlier_share(w_OI: Tensor, norm_I: Tensor, threshold: float) -> float:
    """The share of entries of |w| * norm that are above `threshold` times their mean."""

    def scores(part: slice) -> Tensor:
        return w_OI[part].to(torch.float32, copy=True).abs_().mul_(norm_I)

    limit = threshold * sum(float(scores(part).sum()) for part in row_parts(w_OI)) / w_OI.numel()
    return sum(int((scores(part) > limit).sum()) for part in row_parts(w_OI)) / w_OI.numel()


def weight_norm(block: Named) -> float:
    """The mean norm of a layer's matrices."""
    return mean([float(torch.linalg.vector_norm(p.detach()).float()) for _, p in block if p.ndim == 2])


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
