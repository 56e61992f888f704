"""A training job from end to end: read, plan, load, train inside the budget, write the result and the receipt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_iter

from satchel.core.book import make
from satchel.core.disk import require_room
from satchel.core.errors import UserError
from satchel.core.job import TrainJob
from satchel.core.report import Report
from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.cross_entropy import WHOLE
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.source import Source
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.data import Dataset
from satchel.run.device import resolve
from satchel.run.export import export
from satchel.run.folder import begun_with, check_out, require_same
from satchel.run.gap import gap, said
from satchel.run.governor import Governor
from satchel.run.memory import install_pool
from satchel.run.metrics import FILE, Metrics, read_metrics
from satchel.run.planner import Plan, plan
from satchel.run.receipt import Line, Receipt
from satchel.run.rung import DEFAULTS, PROCESS, SLOTS, Extent, Rung
from satchel.run.trainer import TrainResult, train
from satchel.run.warm import Samples


@dataclass(frozen=True)
class Beginning:
    """What a kind of job begins with: here kinds of training differ, and nowhere behind."""

    config: ModelConfig
    tokenizer_from: Source  # whose tokenizer goes with what is written
    prompt_1T: Tensor  # that a merge is checked on
    dataset: Dataset
    load: Callable[[TrainJob, str], Decoder]  # the model, for the job that was planned, on that device


J = TypeVar("J", bound=TrainJob)
SAMPLED = 16  # steps, and batches of an evaluation, whose sizes are looked at


def conduct(job: J, begin: Callable[[J, Report], Beginning], report: Report) -> Receipt:
    """Run a job inside its budget; adapter or model, metrics and receipt.json are in `job.out` afterwards.

    Raises DoesNotFit before anything is loaded if no plan fits the budget, UserError for bad input, a full disk or a
    loss that is no number, JobError if memory runs out; what was saved until then stays, and
    `resume=True` goes on from it.
    """
    check_out(job)
    job = _as_begun(job)
    kind = resolve(job.device)
    pool = install_pool() if kind == "cpu" else None
    begun = begin(job, report)
    samples = partial(_samples, job, begun.dataset)
    extent = _extent(job, begun.dataset)
    made = plan(job, begun.config, extent, look_for_smallest=False, samples=samples, report=report)
    report.plan(made)
    rung = made.require()
    if kind == "cpu":  # whose second tier is a file beside the output
        require_room(Path(job.out), rung.rehearsal.second_tier_bytes)
    governor = Governor(kind, made.budget_bytes, pool)
    governor.begin()
    try:
        assembly = assemble(rung.job, begun.load(rung.job, kind))
        result = train(rung.job, assembly, begun.dataset, report, governor)
        measured = _accounts(assembly)
        outputs = {} if result.stopped else export(rung.job, assembly, begun.tokenizer_from, begun.prompt_1T)
        receipt = _receipt(made, rung, result, governor, measured, outputs)
    finally:
        governor.end()
    receipt.write(Path(job.out))
    report.end(receipt)
    return receipt


def load_weights(source: Source, job: TrainJob, device: str) -> Decoder:
    """The model as the job stores it."""
    return load(source, DTYPES[job.dtype], device, make("format", job.format))


def _extent(job: TrainJob, dataset: Dataset) -> Extent:
    if not len(dataset.train):
        raise UserError("data: nothing is left to train on; add documents, or lower eval_share")
    steps, _ = dataset.train.length(job.batch, job.steps, job.epochs)
    return Extent(dataset.train.fullest(), steps, len(dataset.held_out))


def _samples(job: TrainJob, dataset: Dataset, micro_batch: int) -> Samples:
    """One batch of each size that the first steps and the first of an evaluation have."""
    steps, total = dataset.train.length(job.batch, job.steps, job.epochs)
    rows = (dataset.train.step_rows(step, job.batch, job.seed, total) for step in range(min(steps, SAMPLED)))
    trained = chain.from_iterable(dataset.train.batches(each, micro_batch) for each in rows)
    evaluated = chain.from_iterable(
        islice(held_out.in_order(micro_batch), SAMPLED) for held_out in dataset.held_out.domains().values()
    )
    return Samples(_sizes(trained), _sizes(evaluated))


def _sizes(batches: Iterable[Batch]) -> list[Batch]:
    filled = (batch.filled() for batch in batches)
    return list({(batch.tokens_1N.shape[1], -(-batch.count // WHOLE)): batch for batch in filled}.values())


def _as_begun(job: J) -> J:
    """A resumed job takes from the run that it goes on with what the planner chose then.

    Raises UserError if it is another job.
    """
    before = begun_with(job.out, type(job)) if job.resume else None
    if before is None:
        return job
    chosen = {slot: getattr(before, slot) for slot in SLOTS if getattr(job, slot) == DEFAULTS[slot]}
    job = dataclasses.replace(job, **chosen)
    require_same(job, before)
    return job


def _accounts(assembly: Assembly) -> dict[str, int]:
    """Bytes of the tensors that last for the whole run."""
    trained = {id(p) for _, p in assembly.parameters}
    tensors = list(assembly.model.state_dict(keep_vars=True).values())
    new = [t for t in tensors if id(t) in trained] if assembly.adapter else []
    old = [t for t in tensors if not assembly.adapter or id(t) not in trained]
    state = [leaf for leaf in tree_iter(dict(assembly.optimizer.state)) if isinstance(leaf, Tensor)]
    return {name: _size(group) for name, group in (("weights", old), ("adapter", new), ("optimizer", state))}


def _size(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _receipt(
    made: Plan, rung: Rung, result: TrainResult, governor: Governor, measured: dict[str, int], outputs: dict[str, str]
) -> Receipt:
    progress = result.progress
    losses = {
        "held_out_before": progress.held_out_before,
        "held_out_after": progress.held_out_after if progress.evaluated > 0 else None,
        "training_first": progress.first_loss,
        "training_last": progress.last_loss,
    }
    sources = _by_source(read_metrics(Path(rung.job.out) / FILE))
    losses |= {f"held_out_before/{name}": points[0][1] for name, points in sources.items()}
    losses |= {f"held_out_after/{name}": points[-1][1] for name, points in sources.items()}
    return Receipt(
        job=rung.job.to_dict(),
        device=made.device,
        budget_bytes=made.budget_bytes,
        lines=tuple(_lines(rung, result, governor, measured)),
        losses={name: loss for name, loss in losses.items() if loss is not None},
        tokens=progress.tokens,
        seconds=progress.seconds,
        outputs=outputs | {"checkpoint": str(result.checkpoint)},
        notes=(
            *governor.acts,
            *_gaps(sources),
            *(["stopped before the last step; go on with resume"] if result.stopped else []),
        ),
    )


def _by_source(lines: list[Metrics]) -> dict[str, list[tuple[int, float]]]:
    """Each source's evaluations as (step, held-out loss); nothing where the data have no named sources."""
    prefix, found = "held_out_loss/", {}
    for line in lines:
        for name in line:
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append((int(line["step"]), line[name]))
    return found


def _gaps(sources: dict[str, list[tuple[int, float]]]) -> list[str]:
    """A sentence for each source whose held-out loss rose while it was watched."""
    gaps = {name: gap(points) for name, points in sources.items() if len(points) > 2}
    return [said(name, found) for name, found in gaps.items() if found.depth > 0]


def _lines(rung: Rung, result: TrainResult, governor: Governor, measured: dict[str, int]) -> Iterator[Line]:
    tensors = rung.rehearsal.peak.peak_bytes
    process = rung.accounts.get(PROCESS, 0)
    tensor_peak, peak = governor.tensor_peak_bytes(), governor.peak_bytes()
    for name, size in measured.items():
        if size:
            yield Line(name, "bytes", rung.accounts.get(name, 0), size)
    passing = sum(size for name, size in rung.accounts.items() if name not in (*measured, PROCESS))
    rest = tensor_peak - sum(measured.values()) if tensor_peak is not None else None
    yield Line("gradients, activations, workspace", "bytes", passing, rest)
    yield Line("all tensors, at the peak", "bytes", tensors, tensor_peak)
    if process:
        yield Line(PROCESS, "bytes", process, peak - tensor_peak if tensor_peak is not None else None)
    yield Line("peak", "bytes", rung.peak_bytes, peak)
    yield Line("optimizer step", "seconds", rung.seconds_per_step, _step_seconds(Path(rung.job.out)))


def _step_seconds(out: Path) -> float | None:
    """The median wall time of the optimizer steps after the first."""
    steps = [line for line in read_metrics(out / FILE) if "tokens_per_second" in line]
    tokens = [b["tokens"] - a["tokens"] for a, b in zip(steps[:-1], steps[1:], strict=True)]
    seconds = sorted(n / line["tokens_per_second"] for n, line in zip(tokens, steps[1:], strict=True))
    return seconds[len(seconds) // 2] if seconds else None
