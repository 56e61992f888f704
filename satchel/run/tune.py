"""The tune job from end to end: read, plan, load, train inside the budget, write the result and the receipt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_iter

from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.core.report import SILENT, Report
from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.data import read_dataset
from satchel.run.device import resolve
from satchel.run.export import export
from satchel.run.folder import begun_with, check_out, require_same
from satchel.run.governor import Governor
from satchel.run.memory import install_pool
from satchel.run.metrics import FILE, read_metrics
from satchel.run.packing import Rows
from satchel.run.planner import Plan, plan
from satchel.run.receipt import Line, Receipt
from satchel.run.rung import DEFAULTS, PROCESS, SLOTS, Extent, Rung
from satchel.run.trainer import TrainResult, train


def tune(job: TuneJob, report: Report = SILENT) -> Receipt:
    """Run a tune job inside its budget; adapter or model, metrics and receipt.json are in `job.out` afterwards.

    Raises DoesNotFit before anything is loaded if no plan fits the budget, UserError for bad input, a full disk or a
    loss that is no number, JobError if memory runs out; what was saved until then stays, and
    `resume=True` goes on from it.
    """
    check_out(job)
    job = _as_begun(job)
    kind = resolve(job.device)
    pool = install_pool() if kind == "cpu" else None
    source = find_source(job.model)
    dataset = read_dataset(job, load_tokenizer(source))
    steps, _ = dataset.train.length(job.batch, job.steps, job.epochs)
    extent = Extent(fullest_row(dataset.train), steps, len(dataset.held_out))
    made = plan(job, source.config, extent, look_for_smallest=False)
    report.plan(made)
    rung = made.require()
    governor = Governor(kind, made.budget_bytes, pool)
    governor.begin()
    try:
        decoder = load(source, DTYPES[job.dtype], kind, make("format", rung.job.format))
        assembly = assemble(rung.job, decoder)
        result = train(rung.job, assembly, dataset, report, governor)
        measured = _accounts(assembly)
        outputs = {} if result.stopped else export(rung.job, assembly, source)
        receipt = _receipt(made, rung, result, governor, measured, outputs)
    finally:
        governor.end()
    receipt.write(Path(job.out))
    report.end(receipt)
    return receipt


def fullest_row(rows: Rows) -> tuple[int, ...]:
    """The lengths of the documents in the row with the most tokens, of these the one with the most documents.

    Raises UserError if there is no row.
    """
    if not len(rows):
        raise UserError("data: nothing is left to train on; add documents, or lower eval_share")
    pieces = [rows.lengths_P[a:b] for a, b in zip(rows.bounds_R1[:-1], rows.bounds_R1[1:], strict=True)]
    fullest = max(pieces, key=lambda lengths: (lengths.sum(), len(lengths)))
    return tuple(int(length) for length in fullest)


def _as_begun(job: TuneJob) -> TuneJob:
    """A resumed job takes from the run that it goes on with what the planner chose then.

    Raises UserError if it is another job.
    """
    before = begun_with(job.out) if job.resume else None
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
    return Receipt(
        job=rung.job.to_dict(),
        device=made.device,
        budget_bytes=made.budget_bytes,
        lines=tuple(_lines(rung, result, governor, measured)),
        losses={name: loss for name, loss in losses.items() if loss is not None},
        tokens=progress.tokens,
        seconds=progress.seconds,
        outputs=outputs | {"checkpoint": str(result.checkpoint)},
        notes=(*governor.acts, *(["stopped before the last step; go on with resume"] if result.stopped else [])),
    )


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
