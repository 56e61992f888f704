"""One real job of bench/activations: `python -m bench._activations_run JSON` prints one line of JSON.

The model is the demo's, with positions for any context; its documents are Python's language reference, end to end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.batch import IGNORE, Batch, whole
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.device import device
from satchel.run.memory import Pool, install_pool, peak_resident_bytes, reset_peak_resident, resident_bytes
from satchel.run.rung import Extent, Pricing, Rung
from satchel.run.step import mean_loss, train_step
from satchel.run.tune import tune  # noqa: F401 - a process is priced that holds what a job's holds
from satchel.run.warm import warm_up
from satchel.train import lemo

ENDLESS = 1 << 22  # positions
LONGEST = 1 << 19  # no context beyond is looked for
SEED = 0
FIELDS = {"model": "demo", "data": "demo", "adapter": "lora:rank=8", "dtype": "bf16", "batch": 1, "micro_batch": 1}


def job_of(activations: str, context: int, **changes: Any) -> TuneJob:
    """The job that every policy is tried on."""
    return TuneJob.from_dict(FIELDS | {"activations": activations, "context": context, "lr": 1e-3} | changes)


def endless() -> ModelConfig:
    """The demo model's configuration without an end of its positions."""
    return dataclasses.replace(find_source("demo").config, context=ENDLESS)


def text_N(tokens: int, skip: int = 0) -> Tensor:
    """Consecutive tokens of real text, from the beginning again where it ends."""
    ids = load_tokenizer(find_source("demo")).encode("\n".join(topics[name] for name in sorted(topics)))
    return torch.from_numpy(np.take(np.array(ids), np.arange(skip, skip + tokens), mode="wrap"))


def documents(lengths: list[int]) -> list[Batch]:
    """A batch of one document for each length."""
    row_N, starts = text_N(sum(lengths) + 1), np.cumsum([0, *lengths])
    return [Batch(row_N[None, a:b], row_N[None, a + 1 : b + 1], (int(b - a),), int(b - a)) for a, b in pairwise(starts)]


def together(batches: list[Batch]) -> Batch:
    """Documents in one row, without padding."""
    tokens, targets = (torch.cat(rows, 1) for rows in zip(*((b.tokens_1N, b.targets_1N) for b in batches), strict=True))
    return Batch(tokens, targets, tuple(b.lengths[0] for b in batches), sum(b.count for b in batches))


def padded(batches: list[Batch]) -> Batch:
    """Documents in a batch as wide as the longest, as most trainers have them."""
    longest = max(b.lengths[0] for b in batches)

    def wide(batch: Batch) -> Batch:
        more = longest - batch.lengths[0]
        targets = functional.pad(batch.targets_1N, (0, more), value=IGNORE)
        return Batch(functional.pad(batch.tokens_1N, (0, more)), targets, (longest,), batch.count)

    return together([wide(batch) for batch in batches])


def contexts() -> list[int]:
    """The sizes that batches have."""
    sizes = [64]
    while sizes[-1] < LONGEST:
        sizes.append(whole(sizes[-1] + 1))
    return sizes


def longest(policy: str, budget: int) -> dict[str, Any]:
    """The longest context that fits by rehearsal, and what is predicted there; empty if none fits."""
    warm_up(job_of("none", 1024), endless(), "cpu")
    rungs: dict[int, Rung] = {}

    def fits(context: int) -> bool:
        job = job_of(policy, context)
        rungs[context] = Pricing(job, endless(), device("cpu"), budget, Extent(), {}).rung(job)
        return rungs[context].fits

    sizes, low, high = contexts(), -1, len(contexts())
    while high - low > 1:  # sizes[low] fits, sizes[high] does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return predicted(rungs[sizes[low]]) if low >= 0 else {}


def predicted(rung: Rung) -> dict[str, Any]:
    """What the plan says of a job."""
    return {
        "context": rung.job.context,
        "predicted_bytes": rung.peak_bytes,
        "predicted_tensor_bytes": rung.rehearsal.peak.peak_bytes,
        "predicted_s": rung.seconds_per_step,
        "second_tier_bytes": rung.rehearsal.second_tier_bytes,
    }


def run(job: TuneJob, budget: int | None, steps: int) -> dict[str, Any]:
    """Some steps on one document of the whole context, inside a budget: peaks, seconds, losses."""
    assembly, pool = _assembly(job)
    batch = documents([job.context])[0].filled()
    _limit(pool, budget)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(train_step(assembly, [batch], assembly.lr)["loss"]))
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": job.context / min(seconds[1:] or seconds),
        "peak_bytes": peak_resident_bytes(),
        "tensor_bytes": pool.peak_bytes,
    }


def learn(job: TuneJob, steps: int, at_random: bool) -> dict[str, Any]:
    """Tune on one document a step; the loss on held-out text before and after, of the whole model."""
    if at_random:
        lemo.received = lambda shares_SG, tokens, group: torch.rand(shares_SG.shape[1])  # type: ignore[assignment]
    assembly, _ = _assembly(job)
    torch.manual_seed(SEED)
    every = documents([job.context] * (steps + 4))
    held_out, rows = every[:4], every[4:]
    before = mean_loss(assembly, held_out)
    losses = [float(train_step(assembly, [row], assembly.lr * (1 - at / steps))["loss"]) for at, row in enumerate(rows)]
    found = {"before": before, "after": mean_loss(assembly, held_out), "losses": losses}
    return found | {"recall": _recall(assembly, held_out[0])}


def unpadded(lengths: list[int], repetitions: int) -> dict[str, Any]:
    """The same documents packed and padded: their losses, and tokens of documents a second."""
    batches, found = documents(lengths), {}
    for name, batch in (("packed", together(batches).filled()), ("padded", padded(batches))):
        assembly, _ = _assembly(job_of("none", max(lengths)))
        loss = float(train_step(assembly, [batch], 0.0)["loss"])
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            train_step(assembly, [batch], 0.0)
            seconds.append(time.perf_counter() - start)
        found[name] = {"loss": loss, "tokens_per_second": sum(lengths) / min(seconds)}
    return found | {"fill": sum(lengths) / (max(lengths) * len(lengths))}


def _recall(assembly: Assembly, batch: Batch) -> float | None:
    """The mean over the blocks of what their predictors find; None where there are none."""
    found, handles = [], []
    for run in assembly.model.runs:
        if isinstance(run, lemo.Eliminating):
            note = lambda _, args, run=run: found.append(run.recall(*args))  # noqa: E731
            handles.append(run.block.register_forward_pre_hook(note))
    mean_loss(assembly, [batch])
    for handle in handles:
        handle.remove()
    return sum(found) / len(found) if found else None


def _assembly(job: TuneJob) -> tuple[Assembly, Pool]:
    pool = install_pool()
    if pool is None:
        raise SystemExit("bench/activations counts bytes in the page pool, which needs Linux and a C++ compiler")
    decoder: Decoder = load(find_source("demo"), DTYPES[job.dtype], "cpu", make("format", job.format))
    decoder.config = endless()
    pool.trim()
    pool.reset_peak()
    reset_peak_resident()
    return assemble(job, decoder), pool


def _limit(pool: Pool, budget: int | None) -> None:
    """As the governor does: what lies outside of tensors is not theirs to take."""
    if budget:
        pool.limit(budget - (resident_bytes() - pool.resident_bytes))


def main(what: str, **argument: Any) -> dict[str, Any]:
    """What one process measures."""
    if what == "unpadded":
        return unpadded(**argument)
    if what == "longest":
        return longest(argument["activations"], argument["budget"])
    job = job_of(argument.pop("activations"), argument.pop("context"))
    return {"run": run, "learn": learn}[what](job, **argument)


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
