"""From a job and a decoder to all that an optimizer step needs. Nothing here depends on tensors' values, so that the
rehearsal assembles fake models by the same code."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.core.job import TrainJob
from satchel.core.seams import Adapter, Objective, Saver, Schedule
from satchel.model.adapters import attach
from satchel.model.decoder import Decoder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of weights, by their names in a job


@dataclass
class Assembly:
    """A model that is ready to train, and what trains it."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    objective: Objective
    schedule: Schedule
    saver: Saver  # of checkpoints: the optimizer waits for it before it changes anything
    parameters: list[tuple[str, nn.Parameter]]  # those that train, by name
    lr: float  # peak learning rate
    clip: float  # largest gradient norm; 0 turns clipping off
    adapter: Adapter | None = None
    rng: torch.Generator | None = None  # the objective's randomness

    @property
    def lasting(self) -> dict[str, torch.Tensor]:
        """The tensors of the model that the job changes, by name: what trains, and what its policies have learned."""
        return dict(self.parameters) | self.model.policy_state()


def assemble(job: TrainJob, decoder: Decoder, trained: Collection[int] | None = None) -> Assembly:
    """Operate on, freeze, adapt and wrap `decoder` in place as the job says, and build its optimizer.

    `trained` are the only layers that train; a rehearsal knows them where they train in turns.

    Raises UserError if a method or knob is unknown, or the context is longer than the model was made for.
    """
    longest = decoder.config.context
    if job.context > longest:
        raise UserError(f"context={job.context} is longer than the model was made for; set context={longest} or less")
    rng = torch.Generator().manual_seed(job.seed)
    if surgery := make("surgery", job.surgery):
        surgery.operate(decoder, rng)
    adapter = make("adapter", job.adapter)
    if adapter is not None:
        attach(decoder, adapter, rng)
    for index, block in enumerate(decoder.layers):
        if trained is not None and index not in trained:
            block.requires_grad_(False)
    decoder.wrap_blocks(make("activations", job.activations), Path(job.out))
    decoder.train()
    parameters = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
    method = make("optimizer", job.optimizer)
    lr = job.lr or method.usual_lr(job.peak_lr, adapted=adapter is not None)
    optimizer = method.build(parameters, lr, job.seed)
    saver = make("checkpoint", job.checkpoint).start(parameters[0][1].device)
    optimizer.register_step_pre_hook(lambda *_: saver.settle())
    return Assembly(
        model=decoder,
        optimizer=optimizer,
        objective=make("objective", job.objective),
        schedule=make("schedule", job.schedule),
        saver=saver,
        parameters=parameters,
        lr=lr,
        clip=job.clip,
        adapter=adapter,
        rng=rng,
    )
