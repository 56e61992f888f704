"""How large a pool an engine may have: a step is rehearsed at its largest, the rest of the memory becomes blocks.

    blocks = (memory - process - weights - largest step) / bytes of a block

What a step takes beside weights and pool does not depend on the pool, so one rehearsal is enough, whatever the memory.
A second model that guesses ahead is rehearsed as the first is: it sees the same rows, before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from satchel.core.book import make
from satchel.core.errors import DoesNotFit, UserError
from satchel.core.request import Sampling
from satchel.core.serve import ServeJob
from satchel.core.serve_seams import Draft, Second
from satchel.core.units import format_bytes, parse_bytes
from satchel.model.config import ModelConfig
from satchel.model.forward import HEAD_ROWS, Part, hidden, logits
from satchel.model.paged import PAGE, Pages, Pool, block_bytes
from satchel.model.sampling import gumbel, kept
from satchel.model.source import Source
from satchel.model.spans import FEW
from satchel.model.storage import storage
from satchel.run.assemble import DTYPES
from satchel.run.extend import extend, shallow, stand_ins
from satchel.run.graphs import GRAPH_BYTES, STREAM_BYTES, sizes
from satchel.run.memory import available_bytes, resident_bytes
from satchel.run.rehearse import staged
from satchel.run.rung import GROWTH, PROCESS, process_bytes
from satchel.run.scheduler import Limits
from satchel.run.tracker import Tracker

GRAPHS = "graphs"  # account of recorded steps
LEAST = 512  # tokens that a pool holds at least; one whole context if that is shorter


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory of a serve job."""

    limits: Limits
    budget_bytes: int
    accounts: dict[str, int]  # bytes of the peak: weights, workspace, process, graphs, requests, kv

    @property
    def tokens(self) -> int:
        """Whose keys and values the pool holds."""
        return self.limits.blocks * PAGE


def capacity(
    job: ServeJob, config: ModelConfig, device: str, reserve_bytes: int = 0, source: Source | None = None
) -> Capacity:
    """The limits of an engine on this machine, now. Raises DoesNotFit with the memory that would do.

    `reserve_bytes` are set aside for the requests of a server; a `source` matters to formats that keep its blocks.
    """
    if job.context > config.context:
        raise UserError(f"context={job.context} is longer than the model was made for; set context={config.context}")
    seconds = second_models(job)
    models = [config, *(second.source.config for second in seconds)]
    context = job.context or config.context
    each = sum(block_bytes(model, DTYPES[job.dtype], job.kv) for model in models)
    budget = _free(device) if job.memory == "auto" else parse_bytes(job.memory)
    tensors = rehearse_all(job, config, seconds, device, source)
    accounts = tensors | {PROCESS: process_bytes(device, sum(tensors.values()), tensors["weights"], GROWTH)}
    if device == "cuda":
        accounts[GRAPHS] = recordings_bytes(job, config, device, source)
    if reserve_bytes and device != "cuda":
        accounts["requests"] = reserve_bytes
    fixed = sum(accounts.values())
    most, least = job.batch * -(-context // PAGE), -(-min(context, LEAST) // PAGE)
    blocks = min((budget - fixed) // each, most)
    if blocks < least:
        needs = format_bytes((fixed + least * each) * 1.005)
        raise DoesNotFit(f"the engine needs {needs} and the budget is {format_bytes(budget)}; {_cures(job)}")
    limits = Limits(blocks, job.batch, job.step_tokens, context)
    return Capacity(limits, budget, accounts | {"kv": blocks * each})


def _cures(job: ServeJob) -> str:
    """What would make room, of what the job does not do yet."""
    weights = ["pack the weights with format=int8"] if job.format == "none" else []
    kv = ["pack keys and values with kv=int8"] if job.kv == "none" else []
    return ", ".join(["raise memory", *weights, *kv, f"or lower step_tokens={job.step_tokens}"])


def second_models(job: ServeJob) -> list[Second]:
    """What runs beside the job's model, if anything does."""
    found = make("decoding", job.decoding).beside()
    return [found] if found else []


def rehearse_all(
    job: ServeJob, config: ModelConfig, seconds: Sequence[Second], device: str, source: Source | None = None
) -> dict[str, int]:
    """Bytes by account at the peak, of the models together: one runs at a time, and their weights all stay."""
    found = [rehearse_engine(job, config, device, source)]
    for second in seconds:
        format = storage(second.format, second.source, device, DTYPES[job.dtype])
        found.append(rehearse_engine(job.replace(format=format), second.source.config, device, second.source))
    highest = max(found, key=lambda accounts: sum(accounts.values()) - accounts["weights"])
    return highest | {"weights": sum(accounts["weights"] for accounts in found)}


def recordings_bytes(job: ServeJob, config: ModelConfig, device: str, source: Source | None = None) -> int:
    """Of all recorded steps: the memory of the largest, which the others share, and what each is beside its tensors."""
    context = job.context or config.context
    table, rows = [0] * -(-context // PAGE), min(FEW, context)
    parts = [Part([0] * rows, Draft(), table, context - rows, n * rows) for n in range(job.batch)]
    tensors = rehearse_engine(job, config, device, source, parts)
    beside = STREAM_BYTES + GRAPH_BYTES * prod(map(len, sizes(context, job.batch, 0)))
    return sum(tensors.values()) - tensors["weights"] + beside


def rehearse_engine(
    job: ServeJob,
    config: ModelConfig,
    device: str,
    source: Source | None = None,
    parts: Sequence[Part] | None = None,
) -> dict[str, int]:
    """Bytes by account at the peak of loading one model and of a step, its largest by default; the pool left out."""
    kinds = list(zip(config.layer_kinds, source.layer_encodings, strict=True)) if source else config.layer_kinds
    layers = shallow(kinds)
    format = None if job.format == "auto" else make("format", job.format)
    with FakeTensorMode(), Tracker("load", "model") as tracker:
        model = staged(config, layers, DTYPES[job.dtype], device, format, tracker, source, frozen=True)
        pool = Pool(model.config, 1, DTYPES[job.dtype], device, kv=job.kv)
        tracker.label([pool.data], "kv")
        tracker.mark("step", "blocks")
        x_ND = hidden(model, pool.pages, parts or [_largest(job, pool.pages)])
        tracker.mark("step", "head")
        _choose(logits(model, x_ND[: min(HEAD_ROWS, job.step_tokens)]))
    phases = extend(tracker, stand_ins(kinds, layers))
    peak = max(phases, key=lambda phase: phase.peak_bytes - phase.accounts.get("kv", 0))
    return {account: size for account, size in peak.accounts.items() if account != "kv"}


def _largest(job: ServeJob, pages: Pages) -> Part:
    """The part of a prompt that takes most: where pages are copied to be read, the last of the longest prompt."""
    past = 0 if pages.native else max((job.context or pages.context) - job.step_tokens, 0)
    return Part([0] * job.step_tokens, Draft(), [0] * -(-(past + job.step_tokens) // PAGE), past, 0)


def _choose(logits_RV: Tensor) -> None:
    """What `choose` allocates at most, but for the choice itself, which needs values."""
    logit_C, token_C = kept(logits_RV[0], Sampling(temperature=1.0))
    torch.add(logit_C, gumbel(0, token_C))


def _free(device: str) -> int:
    """What this process could hold in all, on the device that computes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes() + resident_bytes()
