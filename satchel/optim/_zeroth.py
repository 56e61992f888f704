"""What the zeroth-order methods share: slopes of the loss along random directions instead of its gradient.

    rho_k = slope of the loss along z_k        g = mean_k rho_k z_k, an unbiased estimate of the gradient

`update` says what is done with g: gradient descent (sgd), descent by sign(rho_k) z_k (sign), with heavy-ball momentum,
or Adam. The directions come from their seeds whenever they are needed (`_directions.py`); a seed is a hash of the job's
seed, parameter, step and k, so that nothing has to be saved and a resumed run continues bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from satchel.core.errors import UserError
from satchel.optim._adam import AdamStepper
from satchel.optim._directions import FULL, Draw, descend_, estimate
from satchel.optim._landing import Landing, keep, low_bits

# K directions

STEPPER_KNOBS = ("update", "directions", "sparsity", "resample", "beta1", "beta2", "eps", "rounding")
ADAPTED = 100.0  # how much larger a learning rate adapters take than all weights, in MeZO's experiments
RATES = {"sgd": 1e-6, "sign": 1e-6, "conservative": 1e-6, "momentum": 1e-7, "adam": 1e-5}  # for all weights

Closure = Callable[[], Tensor]


class Part(NamedTuple):
    """A parameter that takes part in a step."""

    number: int  # its place in the state dict
    group: dict[str, Any]
    p: Tensor


@dataclass(frozen=True, kw_only=True)
class Zeroth(Landing):
    """Knobs of every zeroth-order method."""

    update: Literal["sgd", "sign", "momentum", "adam"] = "sgd"  # what is done with the estimated gradient
    directions: int = 1  # slopes that are averaged in a step, 1 or more
    sparsity: float = 0.0  # share of the elements that a direction leaves alone, [0, 1)
    resample: int = 1  # steps between two draws of those elements, 1 or more
    beta1: float = 0.9  # decay of the momentum, or of Adam's first moment, [0, 1)
    beta2: float = 0.999  # decay of Adam's second moment, [0, 1)
    eps: float = 1e-8  # added to the root of Adam's second moment, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [update for update in RATES if update in self.updates()]
        self.require(self.update in known, f"no update '{self.update}'; there is {', '.join(known)}")
        self.require(self.directions >= 1, f"directions={self.directions} is below 1; 1 is usual")
        self.require(0 <= self.sparsity < 1, f"sparsity={self.sparsity} is outside [0, 1); 0.9 is usual")
        self.require(self.resample >= 1, f"resample={self.resample} is below 1; 1 draws anew at every step")
        self.require(0 <= self.beta1 < 1, f"beta1={self.beta1} is outside [0, 1); 0.9 is usual")
        self.require(0 <= self.beta2 < 1, f"beta2={self.beta2} is outside [0, 1); 0.999 is usual")
        self.require(self.eps > 0, f"eps={self.eps} is not above 0; 1e-8 is usual")

    def updates(self) -> tuple[str, ...]:
        """The updates that the method knows."""
        return ("sgd", "sign", "momentum", "adam")

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """The papers': a step that is mostly noise has to be short, the shorter the more elements it moves."""
        return RATES[self.update] * (ADAPTED if adapted else 1)

    def stepper_knobs(self) -> dict[str, Any]:
        """What a stepper needs to know in every group."""
        return {name: getattr(self, name) for name in STEPPER_KNOBS} | {"moments": "follow"}


class ZerothStepper(AdamStepper):
    """A stepper that asks its closure for losses alone.

    State of a parameter of n elements: `step`; of momentum `exp_avg`, of Adam both moments, in the parameter's dtype; n
    int16 `low` bits where rounding is fp32.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, seed: int, **knobs: Any) -> None:
        super().__init__(groups, lr, seed, **knobs)
        self.parts = [list(range(len(self.index())))]  # numbers of the parameters that are moved together

    def slope(self, part: list[Part], which: int, closure: Closure) -> Tensor:
        """The slope of the loss along direction `which`, a scalar. Leaves the parameters as they are."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:
        """One optimizer step; the mean of the losses that were measured. Raises UserError without a closure."""
        if closure is None:
            raise UserError(
                f"{type(self).__name__} has no gradients: call step(closure) with a function that computes and returns "
                "the loss, without loss.backward()"
            )
        losses: list[Tensor] = []

        def noted() -> Tensor:
            losses.append(closure())
            return losses[-1]

        index = self.index()
        self.before_write()
        for numbers in self.parts:
            self.descend([Part(number, *index[number]) for number in numbers], noted)
        return torch.stack([loss.detach() for loss in losses]).mean()

    def descend(self, part: list[Part], closure: Closure) -> None:
        """Measure the slopes of some parameters, and move these."""
        rho_K = self.slopes(part, closure)
        for each in part:
            self.move(each, rho_K)

    def slopes(self, part: list[Part], closure: Closure) -> Tensor:
        """What each direction goes into the estimate with."""
        group = part[0].group
        rho_K = torch.stack([self.slope(part, which, closure) for which in range(group["directions"])]).float()
        return (rho_K.sign() if group["update"] == "sign" else rho_K) / group["directions"]

    def move(self, part: Part, rho_K: Tensor) -> None:
        """Move a parameter by the estimate that its directions and their slopes make."""
        _, group, p = part
        draw, seed, state = self.draw(part), self._seed(part, "landing"), self.state[p]
        low, flat = self.low(part), p.detach().view(-1)
        state["step"] = state.get("step", 0) + 1
        torch.autograd.graph.increment_version(p)
        if group["update"] == "adam":
            p.grad = estimate(flat, low, rho_K, *draw).view_as(p)
            self.update(p, state, group, seed)
            p.grad = None
            return
        momentum, beta = None, 0.0
        if group["update"] == "momentum":
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(flat)
            momentum, beta = state["exp_avg"], group["beta1"]
        rates = (group["rounding"], beta, group["lr"], keep(group), seed)
        descend_(flat, low, momentum, rho_K, *draw, *rates)

    def low(self, part: Part) -> Tensor | None:
        """The low bits of a parameter that has them, from its first use on."""
        state = self.state[part.p]
        if "step" not in state and "low" not in state:
            state.update(low_bits(part.p, part.group))
        return state.get("low")

    def draw(self, part: Part, which: int | None = None) -> Draw:
        """What one or all of a parameter's directions of the step under way are drawn from."""
        group, step = part.group, self.state[part.p].get("step", 0)
        chosen = range(group["directions"]) if which is None else [which]
        seeds = [self._seed(part, f"{step}/{each}") for each in chosen]
        mask_seed = self._seed(part, f"sparse/{step // group['resample']}")
        return Draw(seeds, group.get("radius", 0.0), round(group["sparsity"] * FULL), mask_seed)

    def _seed(self, part: Part, what: str) -> int:
        where = f"{part.group['seed']}/{part.number}"
        step = self.state[part.p].get("step", 0) if what == "landing" else ""
        return zlib.crc32(f"{where}/{what}{step}".encode())


def consecutive(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The places of `sizes` in so many parts, or as many as there are places, none empty, of about equal sums."""
    parts: list[list[int]] = []
    part, held, rest, count = [], 0, sum(sizes), min(count, len(sizes))
    for place, size in enumerate(sizes):
        part.append(place)
        held += size
        to_come, left = count - len(parts) - 1, len(sizes) - place - 1
        if to_come and (left == to_come or held * (to_come + 1) >= rest):
            parts.append(part)
            part, held, rest = [], 0, rest - held
    return [*parts, part]


def numbers_of(named_parameters: Sequence[tuple[str, nn.Parameter]], stepper: ZerothStepper) -> list[int]:
    """For each parameter its number in the state dict."""
    places = {id(p): number for number, (_, p) in enumerate(stepper.index())}
    return [places[id(p)] for _, p in named_parameters]
