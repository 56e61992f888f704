"""One measurement of satchel: `python -m bench._tune_satchel JSON` prints one line of JSON. See bench/tune.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench._tune_loop import BATCH, CLIP, CONTEXT, UNKNOWN, Allocator, Tokens, Tuning, run
from satchel.core import book
from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.run.assemble import Assembly, assemble
from satchel.run.data import Corpus
from satchel.run.memory import Pool, install_pool
from satchel.run.packing import Rows, pack
from satchel.run.rehearse import DTYPES
from satchel.run.step import mean_loss, train_step


def rows(blocks_MC: np.ndarray) -> Rows:
    """Blocks as the house's rows, in the same order: each is one document that fills a row of its own."""
    count, length = blocks_MC.shape
    starts = np.arange(count + 1, dtype=np.int64) * length
    corpus = Corpus(blocks_MC.reshape(-1), np.ones(blocks_MC.size, dtype=bool), starts, "text")
    return pack(corpus, np.arange(count), length - 1)


def tuning(job: TuneJob, decoder: Decoder, tokens: Tokens) -> Tuning:
    """The job's own assembly and step over these tokens."""
    assembly, train, held_out = assemble(job, decoder), rows(tokens.train_MC), rows(tokens.held_out_MC)

    def step(number: int) -> float:
        batches = train.batches(tokens.order_SB[number], job.batch)
        lr = assembly.lr * assembly.schedule.at(number, job.steps)
        return float(train_step(assembly, batches, lr)["loss"])

    return Tuning(step, lambda: _held_out_loss(assembly, held_out), assembly.optimizer)


def _held_out_loss(assembly: Assembly, held_out: Rows) -> float:
    return mean_loss(assembly, held_out.batches(range(len(held_out)), BATCH))


def allocator(pool: Pool | None) -> Allocator:
    """What the page pool knows."""
    if pool is None:
        return UNKNOWN

    def trim() -> None:
        pool.trim()
        pool.reset_peak()

    return Allocator(trim, lambda: pool.peak_bytes)


def main(work: str, steps: int, **settings: Any) -> dict[str, Any]:
    """Measure the job that `settings` make, on the model and the tokens in the folder `work`."""
    fields = {"context": CONTEXT, "batch": BATCH, "micro_batch": BATCH, "clip": CLIP, "schedule": "constant:warmup=0"}
    job = TuneJob.from_dict({"model": f"{work}/model", "data": "demo", "steps": steps} | fields | settings)
    for entry in book.entries():  # as a planned job has: their imports are no part of a step
        entry.load()
    pool = install_pool()
    tokens = Tokens.read(Path(work) / "tokens.npz")
    decoder = load(job.model, DTYPES[job.dtype], "cpu", make("format", job.format))
    return run(decoder, lambda: tuning(job, decoder, tokens), steps, allocator(pool))


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
