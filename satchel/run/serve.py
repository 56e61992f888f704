"""From a serve job to an engine that is ready: capacity first, weights after, then the memory's limit in force."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.core.request import Request, Sampling
from satchel.core.serve import ServeJob
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.paged import PAGE
from satchel.model.source import find_source, load_tokenizer
from satchel.model.storage import storage
from satchel.model.tokenizer import Tokenizer
from satchel.run.assemble import DTYPES
from satchel.run.capacity import GRAPHS, Capacity, capacity, second_models
from satchel.run.device import resolve
from satchel.run.engine import Engine
from satchel.run.governor import Governor
from satchel.run.graphs import runner
from satchel.run.memory import install_pool
from satchel.run.scheduler import Limits
from satchel.run.warm import miniature


@dataclass(frozen=True)
class Service:
    """An engine and what it was made from."""

    job: ServeJob
    engine: Engine
    tokenizer: Tokenizer
    capacity: Capacity
    governor: Governor  # call `end` when the engine is no longer used
    beside: Any = None  # what was made beside it


def open_service(
    job: ServeJob,
    beside: Callable[[Tokenizer, int], Any] = lambda tokenizer, vocabulary: None,
    reserve_bytes: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Service:
    """Load the model and make its engine. Raises DoesNotFit with the memory that would do, UserError as `load` does.

    `beside` makes of tokenizer and vocabulary what else the process needs: its memory is counted before the pool is
    sized. `reserve_bytes` are left out of it.
    """
    device = resolve(job.device)
    pages = install_pool() if device == "cpu" else None
    source = find_source(job.model)
    tokenizer = load_tokenizer(source)
    other = beside(tokenizer, source.config.vocab)
    job = job.replace(format=storage(job.format, source, device, DTYPES[job.dtype]))
    for each in (source, *(second.source for second in second_models(job))):
        _warm_up(job, each.config, device)
    if pages:
        pages.trim()  # those that were never touched would be taken for a part of what is resident
    room = capacity(job, source.config, device, reserve_bytes, source)
    governor = Governor(device, room.budget_bytes, pages)
    governor.begin()
    model = load(source, DTYPES[job.dtype], device, make("format", job.format), frozen=True)
    engine = Engine(
        model,
        room.limits,
        tokenizer,
        admission=job.admission,
        preemption=job.preemption,
        decoding=job.decoding,
        skip=job.skip,
        kv=job.kv,
        seed=job.seed,
        runner=runner(device, room.accounts.get(GRAPHS, 0)),
        clock=clock,
    )
    for folder in adapter_folders(job.adapters):
        engine.register(folder.name, folder)
    engine.warm()
    return Service(job, engine, tokenizer, room, governor, other)


def adapter_folders(home: str) -> list[Path]:
    """The adapters in a folder of them. Raises UserError for one that holds none."""
    found = sorted(path.parent for path in Path(home).glob("*/adapter_config.json")) if home else []
    if home and not found:
        raise UserError(f"adapters: no folder in '{home}' holds an adapter_config.json; give the folder above them")
    return found


def _warm_up(job: ServeJob, config: ModelConfig, device: str) -> None:
    """Bring the process to its working size before its memory is counted: serve a little with one of its blocks."""
    model = Decoder(miniature(config, DTYPES[job.dtype]), DTYPES[job.dtype], device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    context = min(job.step_tokens + 8, model.config.context)
    engine = Engine(model, Limits(2 * context // PAGE + 4, 4, job.step_tokens, context), kv=job.kv)
    for temperature in (0.0, 1.0):
        how = Sampling(temperature=temperature, top_p=0.9 if temperature else 1.0)
        engine.submit(Request(prompt=(1,) * (context - 3), max_tokens=3, sampling=how))
    engine.run()
