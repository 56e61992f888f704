"""One run of bench/zeroth, in a process of its own: `python -m bench._zeroth_run JSON` prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._harness import median
from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.batch import IGNORE, Batch
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.memory import install_pool
from satchel.run.rehearse import rehearse
from satchel.run.step import mean_loss, train_step

BATCH, CONTEXT = 8, 64  # examples of a step, tokens of an example at most

Example = tuple[list[int], int]  # the prompt's tokens, and its class


def batch_of(examples: list[Example], answers: list[int]) -> Batch:
    """Prompts side by side, of which only the answer behind each is learnt."""
    tokens_N = torch.tensor([token for prompt, _ in examples for token in prompt])
    lengths = tuple(len(prompt) for prompt, _ in examples)
    targets_N = torch.full_like(tokens_N, IGNORE)
    targets_N[torch.tensor(lengths).cumsum(0) - 1] = torch.tensor([answers[label] for _, label in examples])
    return Batch(tokens_N[None], targets_N[None], lengths, len(examples)).filled()


@torch.no_grad()
def accuracy(decoder: Decoder, examples: list[Example], answers: list[int]) -> float:
    """The share of the prompts behind which the right one of the two answers is the likelier."""
    right = 0
    for start in range(0, len(examples), BATCH):
        some = examples[start : start + BATCH]
        batch = batch_of(some, answers)
        ends = torch.tensor(batch.lengths[: len(some)]).cumsum(0) - 1
        hidden_ND = decoder.eval().hidden(batch.tokens_1N, lengths=batch.lengths)[0]
        chosen = decoder.logits(hidden_ND[ends])[:, answers].argmax(1)
        right += int((chosen == torch.tensor([label for _, label in some])).sum())
    return right / len(examples)


def learn(job: TuneJob, task: dict[str, Any], steps: int, factor: float) -> dict[str, Any]:
    """Train with `factor` times the optimizer's usual learning rate."""
    assembly, train, test, answers = _assembly(job), task["train"], task["test"], task["answers"]
    lr, rng, losses, walls = assembly.lr * factor, np.random.default_rng(job.seed), [], []
    before = accuracy(assembly.model, test, answers)
    assembly.model.train()
    for _ in range(steps):
        batch, began = batch_of([train[i] for i in rng.choice(len(train), BATCH, replace=False)], answers), time.time()
        losses.append(float(train_step(assembly, [batch], lr)["loss"]))
        walls.append(time.time() - began)
    after = accuracy(assembly.model, test, answers)
    return {"lr": lr, "before": before, "after": after, "losses": losses, "wall_s": median(walls)}


def everywhere(batch: Batch) -> Batch:
    """The same rows, of which every token is learnt, as a plan takes it to be."""
    tokens_1N = batch.tokens_1N
    return Batch(tokens_1N, tokens_1N.roll(-1), batch.lengths, tokens_1N.numel())


def peaks(job: TuneJob, task: dict[str, Any]) -> dict[str, Any]:
    """Bytes of tensors at the peak of inference and of the second step, on the longest rows; and what was rehearsed."""
    pool = install_pool()
    if pool is None:
        raise SystemExit("bench/zeroth counts bytes in the page pool, which needs Linux and a C++ compiler")
    assembly = _assembly(job)
    longest = everywhere(batch_of(sorted(task["train"], key=lambda example: -len(example[0]))[:BATCH], task["answers"]))
    found = {}
    for name, call in (
        ("inference", lambda: mean_loss(assembly, [longest])),
        ("training", lambda: [train_step(assembly, [longest], 0.0) for _ in range(2)]),
    ):
        pool.reset_peak()
        call()
        found[f"{name}_bytes"] = pool.peak_bytes
    phases = {phase.name: phase.peak_bytes for phase in rehearse(job, assembly.model.config, longest.lengths).phases}
    return found | {"rehearsed_bytes": phases["train"]}


def _assembly(job: TuneJob) -> Assembly:
    install_pool()
    return assemble(job, load(job.model, DTYPES[job.dtype], "cpu", make("format", job.format)))


def main(work: str, what: str, examples: int, seed: int = 0, **argument: Any) -> dict[str, Any]:
    """What one process measures of the task in the folder `work`."""
    task = json.loads((Path(work) / f"task-{examples}.json").read_text())
    sizes = {name: argument.pop(name) for name in ("steps", "factor") if name in argument}
    fields = {"model": task["model"], "data": "demo", "schedule": "constant:warmup=0", "seed": seed}
    job = TuneJob.from_dict(fields | {"context": CONTEXT, "batch": BATCH, "micro_batch": BATCH} | argument)
    return {"learn": learn, "peaks": peaks}[what](job, task, **sizes)


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
