"""One optimizer step over micro-batches, without a single copy to the host.

    loss = sum over all micro-batches of the summed loss / number of targets in all of them

Dividing by the targets of the whole step, not of each micro-batch, makes the step equal to one large batch however
uneven the lengths are. How gradients come about is the optimizer's choice: it gets the loss as a closure, and calls it
with gradients, without, or several times. The rehearsal runs this very code on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from satchel.core.seams import Closure
from satchel.model.batch import Batch
from satchel.run.assemble import Assembly

Metrics = dict[str, Tensor]


def train_step(assembly: Assembly, micro_batches: Sequence[Batch], lr: float) -> Metrics:
    """Move the weights by one step on these micro-batches; see `take_step`."""
    return take_step(StepLoss(assembly, lambda: micro_batches), lr)


def take_step(closure: StepLoss, lr: float) -> Metrics:
    """One optimizer step. Scalars `loss`, the objective's means, and `grad_norm` if the optimizer made a gradient."""
    optimizer = closure.assembly.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    try:
        # torch's stub would have it give a float; optimizers pass on whatever it gives.
        loss = optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
    finally:
        optimizer.zero_grad(set_to_none=True)
    return closure.metrics | {"loss": loss}


def directly(compute: Callable[[], Metrics]) -> Metrics:
    """What it computes."""
    return compute()


class StepLoss(Closure):
    """The loss of one step, computed anew at every call.

    `micro_batches` makes the batches, and all randomness start anew; `around` runs the computation, and may run it
    again after a failure; `check` gets `loss` before the last backward pass and `grad_norm` before any update, and
    raises if they will not do.
    """

    def __init__(
        self,
        assembly: Assembly,
        micro_batches: Callable[[], Sequence[Batch]],
        around: Callable[[Callable[[], Metrics]], Metrics] = directly,
        check: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.assembly, self.micro_batches, self.around, self.check = assembly, micro_batches, around, check
        self.clip = assembly.clip
        self.metrics: Metrics = {}  # of the last call

    def __call__(self) -> Tensor:
        """See `Closure`."""
        self.metrics |= self.around(self._compute)
        return self.metrics["loss"]

    def clip_factor(self, norm: Tensor) -> Tensor | float:
        """See `Closure`; the norm is checked, and reported as the step's."""
        self.metrics["grad_norm"] = norm
        if self.check:
            self.check("grad_norm", norm)
        return super().clip_factor(norm)

    def _compute(self) -> Metrics:
        """Leaves no gradient behind when it raises, so that the same step may be tried again in smaller pieces."""
        micro_batches = self.micro_batches()
        targets = max(sum(batch.count for batch in micro_batches), 1)
        sums: Metrics = {}
        try:
            for number, batch in enumerate(micro_batches, 1):
                self.last = number == len(micro_batches)
                loss_sum, parts = self.assembly.objective.loss(self.assembly.model, batch, self.assembly.rng)
                if self.check and self.last:
                    self.check("loss", (sums.get("loss", 0) + loss_sum.detach()) / targets)
                if torch.is_grad_enabled():
                    (loss_sum / targets).backward()
                _add(sums, {"loss": loss_sum, **parts})
            self._clip()
        except BaseException:
            self.assembly.optimizer.zero_grad(set_to_none=True)
            raise
        return {name: value / targets for name, value in sums.items()}

    def _clip(self) -> None:
        """Scale the gradients that are left in `.grad`, if there are any."""
        gradients = [p.grad for _, p in self.assembly.parameters if p.grad is not None]
        if not gradients or not self.clips:
            return
        factor = self.clip_factor(gradient_norm(gradients))
        if self.clip > 0:
            for gradient in gradients:
                gradient.mul_(factor)


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients as one vector, float32."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g).float() for g in gradients]))


@torch.no_grad()
def mean_loss(assembly: Assembly, micro_batches: Iterable[Batch]) -> float:
    """The mean loss over the batches' targets, in evaluation mode."""
    assembly.model.eval()
    sums, targets = {}, 0
    try:
        for batch in micro_batches:
            _add(sums, {"loss": assembly.objective.loss(assembly.model, batch, assembly.rng)[0]})
            targets += batch.count
    finally:
        assembly.model.train()
    return float(sums["loss"]) / targets if targets else float("nan")


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, value in parts.items():
        value = (value.detach() if value.requires_grad else value).float()  # detach drops tangents as well
        sums[name] = sums[name] + value if name in sums else value
