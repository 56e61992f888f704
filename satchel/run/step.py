"""One optimizer step over micro-batches, without a single copy to the host.

    loss = sum over all micro-batches of the summed loss / number of targets in all of them

Dividing by the targets of the whole step, not of each micro-batch, makes the step equal to one large batch however
uneven the lengths are. The rehearsal runs this very code on fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from satchel.model.batch import Batch
from satchel.run.assemble import Assembly


def train_step(assembly: Assembly, micro_batches: Sequence[Batch], lr: float) -> dict[str, Tensor]:
    """Accumulate the gradient of all micro-batches, clip it, move the weights. Returns what `accumulate` does."""
    metrics = accumulate(assembly, micro_batches)
    update(assembly, lr)
    return metrics


def accumulate(assembly: Assembly, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Leave the clipped gradient of the mean loss in `.grad`; scalars `loss`, `grad_norm` and the objective's means.

    Leaves no trace when it raises: gradients are dropped, so that the same step may be tried again in smaller pieces.
    """
    targets = max(sum(batch.count for batch in micro_batches), 1)
    sums: dict[str, Tensor] = {}
    try:
        for batch in micro_batches:
            loss_sum, parts = assembly.objective.loss(assembly.model, batch, assembly.rng)
            (loss_sum / targets).backward()
            _add(sums, {"loss": loss_sum, **parts})
        grad_norm = clip_gradients((p for _, p in assembly.parameters), assembly.clip)
    except BaseException:
        assembly.optimizer.zero_grad(set_to_none=True)
        raise
    return {name: value / targets for name, value in sums.items()} | {"grad_norm": grad_norm}


def update(assembly: Assembly, lr: float) -> None:
    """Move the weights by the gradient that `accumulate` left, and drop it."""
    for group in assembly.optimizer.param_groups:
        group["lr"] = lr
    assembly.optimizer.step()
    assembly.optimizer.zero_grad(set_to_none=True)


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


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients in place so that their global norm is at most `limit` (0: only measure). The norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g).float() for g in gradients]))
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, value in parts.items():
        value = value.detach().float()
        sums[name] = sums[name] + value if name in sums else value
