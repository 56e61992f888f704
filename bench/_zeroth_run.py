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
from satchel.run.assemble import DTYPES, assemble
from satchel.run.memory import install_pool
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


def main(work: str, steps: int, seed: int, factor: float, **settings: Any) -> dict[str, Any]:
    """Train on the task in the folder `work`, with `factor` times the optimizer's usual learning rate."""
    task = json.loads((Path(work) / "task.json").read_text())
    train, test, answers = task["train"], task["test"], task["answers"]
    fields = {"model": task["model"], "data": "demo", "schedule": "constant:warmup=0", "seed": seed, "steps": steps}
    job = TuneJob.from_dict(fields | {"context": CONTEXT, "batch": BATCH, "micro_batch": BATCH} | settings)
    pool = install_pool()
    decoder = load(job.model, DTYPES[job.dtype], "cpu", make("format", job.format))
    assembly = assemble(job, decoder)
    lr, rng, losses, walls = assembly.lr * factor, np.random.default_rng(seed), [], []
    before = accuracy(decoder, test, answers)
    decoder.train()
    for _ in range(steps):
        batch, began = batch_of([train[i] for i in rng.choice(len(train), BATCH, replace=False)], answers), time.time()
        losses.append(float(train_step(assembly, [batch], lr)["loss"]))
        walls.append(time.time() - began)
    longest = batch_of(sorted(train, key=lambda example: -len(example[0]))[:BATCH], answers)
    found = {"lr": lr, "before": before, "after": accuracy(decoder, test, answers), "losses": losses}
    peaks = {}
    for name, call in (
        ("inference", lambda: mean_loss(assembly, [longest])),
        ("training", lambda: train_step(assembly, [longest], 0.0)),
    ):
        if pool:
            pool.reset_peak()
        call()
        peaks[f"{name}_bytes"] = pool.peak_bytes if pool else None
    return found | peaks | {"wall_s": median(walls)}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
