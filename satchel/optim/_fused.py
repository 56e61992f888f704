"""Updates within the backward pass: a parameter's gradient is used and freed as soon as it is whole.

So a model's gradients are never alive together, and no bytes of the account "gradients" grow with depth. With several
micro-batches they add up in `.grad` as always, and the last backward pass updates. Clipping needs the norm of all
gradients before the first update: the loss is then computed twice, the first time for the norm alone.
Paper: https://arxiv.org/abs/2306.09782
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from satchel.core.errors import UserError
from satchel.core.seams import Closure
from satchel.optim._landing import Landing
from satchel.optim._shared import Stepper, gradient

Kind = TypeVar("Kind", bound=Stepper)


@dataclass(frozen=True, kw_only=True)
class Layerwise(Landing):
    """A method that updates after the backward pass or, with `layerwise`, within it: each parameter as soon as its
    gradient is whole, which is freed at once. The same result, for a second backward pass where gradients are clipped.
    """

    layerwise: bool = False  # update within the backward pass, and free each gradient at once

    @property
    def saves(self) -> tuple[str, ...]:
        """See `Method`."""
        return (*self.card.saves, "gradients") if self.layerwise else self.card.saves

    @property
    def undivided(self) -> bool:
        """See `OptimizerMethod`."""
        return self.layerwise

    def within(self, stepper: type[Kind]) -> type[Kind]:
        """The class of a stepper of this method, whose updates happen as `layerwise` says."""
        return within_backward(stepper) if self.layerwise else stepper


class PlainClosure(Closure):
    """A function of a user's own loop, in which one backward pass makes the gradients."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function

    def __call__(self) -> Tensor:
        """What the function returns."""
        return self.function()


class FusedStepper(Stepper):
    """A stepper whose updates happen within `closure()`; mixed in before the stepper whose `update` it runs."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """One optimizer step. Raises UserError without a closure: no gradient outlives the backward pass."""
        if closure is None:
            raise UserError(
                f"{type(self).__name__} updates within the backward pass: call step(closure) with a function that "
                "computes the loss, calls loss.backward() and returns the loss"
            )
        closure = closure if isinstance(closure, Closure) else PlainClosure(closure)
        closure.clips = False
        factor = closure.clip_factor(self._norm(closure)) if closure.clip > 0 else None
        announce = cache(self.before_write)  # once, by whichever gradient is whole first

        def update(number: int, group: dict[str, Any], p: Tensor) -> None:
            announce()
            if factor is not None:
                gradient(p).mul_(factor)
            self.update_one(number, group, p)
            p.grad = None

        return self._each_gradient(closure, update)

    def _norm(self, closure: Closure) -> Tensor:
        """The norm of all gradients, none of which is kept."""
        norms: dict[int, Tensor] = {}

        def measure(number: int, group: dict[str, Any], p: Tensor) -> None:
            norms[number] = torch.linalg.vector_norm(p.grad).float()
            p.grad = None

        self._each_gradient(closure, measure)
        return torch.linalg.vector_norm(torch.stack([norms[number] for number in sorted(norms)]))

    def _each_gradient(self, closure: Closure, take: Callable[[int, dict[str, Any], Tensor], None]) -> Tensor:
        """Compute the loss, and hand over every parameter as soon as its gradient is whole."""

        def arrived(number: int, group: dict[str, Any], p: Tensor) -> None:
            if closure.last:
                take(number, group, p)

        index = [(number, group, p) for number, (group, p) in enumerate(self.index()) if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(partial(arrived, number, group)) for number, group, p in index]
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            for hook in hooks:
                hook.remove()
        for number, group, p in index:  # those that the last micro-batch did not reach
            if p.grad is not None:
                take(number, group, p)
        return loss


def within_backward(stepper: type[Kind]) -> type[Kind]:
    """The same stepper, whose updates happen within the backward pass; one that is so already."""
    if issubclass(stepper, FusedStepper):
        return stepper
    return cast("type[Kind]", type(f"Layerwise{stepper.__name__}", (FusedStepper, stepper), {}))
