"""Training a few blocks at a time: which ones, for how long, and what becomes of the others.

A block is all that stands below the first number in a parameter's name: `model.layers.3.` in our models and most of
Hugging Face's, `transformer.h.3.` in GPT-2, `layer1.0.` in a ResNet. What has no number in its name (embeddings, final
norm, head) is in no block.

Every `period` steps the sampler draws the blocks that train next. The others are frozen: `requires_grad` is off, so
that the backward pass computes and stores no gradient of theirs, and their optimizer state is dropped; it begins at
zero when they train again. A block that is drawn twice in a row keeps its state. The draw is a function of the seed and
of the number of steps taken, both in the optimizer's groups: a resumed run draws what the uninterrupted one does.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from satchel.core.errors import UserError
from satchel.optim._adam import Adam, AdamStepper
from satchel.optim._fused import FusedStepper
from satchel.optim._shared import STORES, Stepper, decay_groups

BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
ORDERS = ("ascending", "descending", "random")
MOMENTS = ("follow", *STORES)
Named = Sequence[tuple[str, nn.Parameter]]


def blocks_of(named_parameters: Named) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters that train, by block, in the order of the model. Raises UserError if no name has a number."""
    blocks: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in named_parameters:
        if p.requires_grad and (found := BLOCK.match(name)):
            blocks.setdefault(found[0], []).append((name, p))
    if not blocks:
        first = named_parameters[0][0] if named_parameters else "nothing"
        raise UserError(
            f"no layer to train in turns: no name has a number, as in layers.3.weight; the first is {first}"
        )
    return list(blocks.values())


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Says which blocks train in each period."""

    at_once: int  # blocks
    period: int  # steps between two draws
    order: str = ""  # one of ORDERS, in which every block has its turn; '': drawn without memory

    def draw(self, count: int, number: int, seed: int, weights: Sequence[float] = ()) -> frozenset[int]:
        """The blocks of period `number`, of `count` in all.

        Drawn without replacement, each next one in proportion to the weights of those that are left; without weights,
        all alike. Those of weight 0 come after all others.
        """
        if self.at_once >= count:
            return frozenset(range(count))
        if not self.order:
            rng = random.Random(f"{seed}/{number}")
            times = [(_arrival(weight, rng), rng.random()) for weight in weights or [1.0] * count]
            return frozenset(sorted(range(count), key=times.__getitem__)[: self.at_once])
        places = range(number * self.at_once, (number + 1) * self.at_once)
        return frozenset(self._turns(count, place // count, seed)[place % count] for place in places)

    def _turns(self, count: int, epoch: int, seed: int) -> Sequence[int]:
        """The order in which all blocks have their turn for the `epoch`th time."""
        if self.order == "random":
            rng = random.Random(f"{seed}/{epoch}")
            return sorted(range(count), key=lambda _: rng.random())
        return range(count) if self.order == "ascending" else range(count - 1, -1, -1)

    def together(self, sizes: Sequence[int], below: bool) -> list[frozenset[int]]:
        """See `OptimizerMethod.together`.

        The largest blocks; of equal ones the last, whose gradients come while the others' activations are still there.
        If nothing below trains, the backward pass ends at the first that does: it is the longest with block 0, and as
        long as on average with blocks in the middle, or evenly spread.
        """
        heaviest = sorted(range(len(sizes)), key=lambda block: (sizes[block], block))[-self.at_once :]
        if below or self.at_once >= len(sizes):
            return [frozenset(heaviest)]
        apart = (len(sizes) + 1) / (self.at_once + 1)
        average = frozenset(int((place + 1) * apart) - 1 for place in range(self.at_once))
        highest = [frozenset([0, *heaviest[1:]])] if 0 not in heaviest else []
        if not highest or sizes[0] != sizes[heaviest[0]]:
            highest.append(frozenset(heaviest))
        return [average, *highest]


def _arrival(weight: float, rng: random.Random) -> float:
    """When an event of this rate first happens: the first few of many are a draw without replacement."""
    waited = -math.log(1 - rng.random())
    return waited / weight if weight > 0 else math.inf


class SampledStepper(Stepper):
    """A stepper that trains some blocks at a time; mixed in before the stepper whose `update` it runs.

    Its groups hold `steps`, those taken so far, and `weights` of the blocks, empty for all alike.
    """

    def sample(self, blocks: Sequence[Named], sampler: Sampler, weights: Sequence[float] = ()) -> None:
        """Let these blocks train in turns from now on, drawn in proportion to the weights if there are any."""
        self.blocks = [[p for _, p in block] for block in blocks]
        self.sampler = sampler
        self.keep_in_groups(steps=0, weights=list(weights))
        self.switch()

    def active(self) -> frozenset[int]:
        """The blocks that train now."""
        group = self.param_groups[0]
        number = group["steps"] // self.sampler.period
        return self.sampler.draw(len(self.blocks), number, group["seed"], group["weights"])

    def switch(self) -> None:
        """Freeze all blocks but the active ones, and drop what is kept of those."""
        active = self.active()
        for number, block in enumerate(self.blocks):
            for p in block:
                p.requires_grad_(number in active)
                if number not in active:
                    p.grad = None
                    self.state.pop(p, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        """One optimizer step over the active blocks and what is in no block; the next ones are drawn after it."""
        loss = super().step(closure)
        steps = self.param_groups[0]["steps"] + 1
        self.keep_in_groups(steps=steps)
        if steps % self.sampler.period == 0:
            self.switch()
        return loss

    def update_one(self, number: int, group: dict[str, Any], p: Tensor) -> None:
        """Step parameter `number`, if it trains now."""
        if p.requires_grad:
            super().update_one(number, group, p)

    def noise(self, number: int, group: dict[str, Any], state: dict[str, Any]) -> int:
        """By the steps of the run: those in the state begin anew, and noise that repeats itself would add up."""
        return zlib.crc32(f"{group['seed']}/{number}/{group['steps'] + 1}".encode())

    def keep_in_groups(self, **values: Any) -> None:
        """Keep plain values where `state_dict` finds them."""
        for group in self.param_groups:
            group.update(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the blocks that train afterwards are those that trained when it was saved."""
        self.state.clear()
        super().load_state_dict(state_dict)
        self.switch()


@dataclass(frozen=True, kw_only=True)
class InTurns(Adam):
    """AdamW on some layers at a time."""

    period: int = 20  # optimizer steps until other layers train, 1 or more
    moments: Literal["follow", "fp32", "bf16", "8bit"] = "follow"  # storage of moments; follow: the parameter's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.period >= 1, f"period={self.period} is below 1; 20 steps are usual")
        self.require(self.moments in MOMENTS, f"no moments '{self.moments}'; there is {', '.join(MOMENTS)}")

    @property
    @abstractmethod
    def sampler(self) -> Sampler:
        """What chooses the layers."""

    def outside(self, named_parameters: Named) -> list[tuple[str, nn.Parameter]]:
        """Of what is in no layer, the parameters that train."""
        return [(name, p) for name, p in named_parameters if not BLOCK.match(name)]

    def build(self, named_parameters: Named, lr: float, seed: int) -> InTurnsStepper:
        """A torch optimizer over the parameters. Raises UserError if none of them is a layer's."""
        blocks, outside = blocks_of(named_parameters), self.outside(named_parameters)
        trained = {id(p) for _, p in [*chain.from_iterable(blocks), *outside]}
        for _, p in named_parameters:
            p.requires_grad_(p.requires_grad and id(p) in trained)
        groups = decay_groups([pair for pair in named_parameters if id(pair[1]) in trained], self.weight_decay)
        stepper = LayerwiseInTurnsStepper if self.layerwise else InTurnsStepper
        optimizer = stepper(groups, lr, seed, **self.stepper_knobs())
        optimizer.sample(blocks, self.sampler)
        return optimizer

    def together(self, sizes: Sequence[int], below: bool) -> list[frozenset[int]]:
        """As many layers as train at once."""
        return self.sampler.together(sizes, below)


class InTurnsStepper(SampledStepper, AdamStepper):
    """State as AdamW's, of what trains now."""


class LayerwiseInTurnsStepper(InTurnsStepper, FusedStepper, AdamStepper):
    """The same within the backward pass. Adam comes last: torch gives a class that was built once its own `step`."""
