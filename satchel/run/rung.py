"""One way to run a job: what it takes of the device, for how long, and what it costs.

The peak is that of the whole process: the rehearsal's tensors and, on a CPU, what the process holds beside them. The
time is that of the arithmetic of load, steps, evaluations and save; what a disk adds is not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from satchel.core import book
from satchel.core.book import Entry
from satchel.core.job import TrainJob
from satchel.core.report import SILENT, Report
from satchel.model.batch import whole
from satchel.model.config import ModelConfig
from satchel.run.device import Device
from satchel.run.measured import Measured
from satchel.run.memory import install_pool, resident_bytes
from satchel.run.rehearse import Rehearsal, rehearse

PROCESS = "process"  # the account of what is not tensors: Python, torch, compiled kernels
GROWTH = 40 << 20  # what a process grows by after `warm_up`: 1 to 70 MiB, mostly less; measured in bench/budget
BLOCKS = 0.03  # of the job's tensors: what CUDA's allocator holds beside them in its blocks; not measured yet
LOOSE_HEAP = 0.65  # the C library's heap holds this much more than is live, beside the weights; measured in bench/plan
SLOTS = ("activations", "optimizer", "format")  # that the planner may fill
DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainJob)}
Measurements = dict[tuple[str, str], Measured]


@dataclass(frozen=True)
class Extent:
    """What the data says of a run. Without data: one document of the whole context a row, steps if the job has them."""

    lengths: tuple[int, ...] = ()  # documents of the fullest row
    steps: int = 0  # optimizer steps; 0: not known
    held_out: int | None = None  # rows of an evaluation; None: not known, so as many as the job allows


@dataclass(frozen=True)
class Rung:
    """One way to run the job."""

    changes: tuple[str, ...]  # what differs from the job as given, `activations=full`
    job: TrainJob
    rehearsal: Rehearsal
    peak_bytes: int  # of the whole process on the device that computes
    accounts: dict[str, int]  # of that peak
    seconds_per_step: float
    seconds: dict[str, float]  # of the run by phase; empty if the number of steps is not known
    loss_ratio: float | None  # held-out loss over the job's as given, as measured; None: not measured
    costs: str  # what the changes spend
    fits: bool
    advice: bool = False  # another kind of job: never chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; docs/PLAN.md says what they are."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("job", "rehearsal")}
        phases = {phase.name: {"peak_bytes": phase.peak_bytes, **phase.accounts} for phase in self.rehearsal.phases}
        more = {"phases": phases, "second_tier_bytes": self.rehearsal.second_tier_bytes}
        more |= {"tokens_per_step": self.rehearsal.tokens}
        return plain | {"job": self.job.to_dict()} | more


@dataclass(frozen=True)
class Pricing:
    """Makes rungs: rehearses jobs of one model on one device."""

    given: TrainJob
    config: ModelConfig
    machine: Device
    budget: int
    extent: Extent
    measured: Measurements
    growth: int = GROWTH  # bytes that the process is taken to grow by from now on
    report: Report = SILENT  # is told of each rung
    rehearsed: dict[TrainJob, Rehearsal] = field(default_factory=dict)  # what needs no second time

    def rung(self, job: TrainJob) -> Rung:
        """Rehearse a job whose micro-batch is set. Raises UserError where the job itself would."""
        if job not in self.rehearsed:
            self.rehearsed[job] = rehearse(job, self.config, self.documents(job), self.machine.kind)
        rehearsal = self.rehearsed[job]
        weights = rehearsal.peak.accounts.get("weights", 0)
        accounts = rehearsal.peak.accounts | {
            PROCESS: process_bytes(self.machine.kind, rehearsal.peak.peak_bytes, weights, self.growth)
        }
        step = self.machine.seconds(rehearsal.work)
        rung = Rung(
            changes=_differences(self.given, job),
            job=job,
            rehearsal=rehearsal,
            peak_bytes=sum(accounts.values()),
            accounts=accounts,
            seconds_per_step=step,
            seconds=self._seconds(job, rehearsal, step),
            loss_ratio=self.loss_ratio(job),
            costs=", ".join(self._costs(job)),
            fits=False,
        )
        rung = dataclasses.replace(rung, fits=rung.peak_bytes <= self.budget)
        self.report.rung(rung)
        return rung

    def loss_ratio(self, job: TrainJob) -> float | None:
        """The product over what changed; None if any of it was not measured as it is. Exact methods change nothing."""
        if job.adapter != self.given.adapter:
            return None
        ratio = 1.0
        for slot in changed_slots(self.given, job):
            found = self.ratio(slot, getattr(job, slot))
            if found is None:
                return None
            ratio *= found
        return ratio

    def ratio(self, slot: str, spelling: str) -> float | None:
        """Held-out loss of a method over that of the plain job; None if it was not measured at least as cheap."""
        if spelling == DEFAULTS[slot] or book.find(slot, spelling.partition(":")[0]).card.fidelity == "exact":
            return 1.0
        found = self.measured.get((slot, spelling))
        if found is None and not _cheaper(slot, spelling):
            found = self.measurement(slot, spelling)
        return found.loss if found else None

    def measurement(self, slot: str, spelling: str) -> Measured | None:
        """Of a method as it is spelled, or wherever its dial stands."""
        return self.measured.get((slot, spelling)) or self.measured.get((slot, _without_dial(slot, spelling)))

    def forms(self, entry: Entry) -> list[str]:
        """The spellings of a method that were measured."""
        return [text for slot, text in self.measured if (slot, text.partition(":")[0]) == (entry.slot, entry.name)]

    def _costs(self, job: TrainJob) -> Iterator[str]:
        for slot in ("adapter", *SLOTS):
            spelling = getattr(job, slot)
            if spelling != getattr(self.given, slot):
                yield f"{spelling}: {self._spent(slot, spelling)}"
        if (job.micro_batch or job.batch) < (self.given.micro_batch or self.given.batch):
            yield "smaller matrix products"

    def _spent(self, slot: str, spelling: str) -> str:
        card = book.find(slot, spelling.partition(":")[0]).card
        if slot not in SLOTS or card.fidelity == "exact":
            return "+".join(card.spends) or "nothing"
        ratio = self.ratio(slot, spelling)
        return f"{'+'.join(card.spends)} ({'not measured' if ratio is None else f'loss {ratio - 1:+.1%}'})"

    def _seconds(self, job: TrainJob, rehearsal: Rehearsal, step: float) -> dict[str, float]:
        """Of the whole run by phase."""
        steps = self.extent.steps or job.steps
        if not steps:
            return {}
        held_out = job.eval_rows if self.extent.held_out is None else self.extent.held_out
        evaluations = 2 + ((steps - 1) // job.eval_every if job.eval_every else 0)
        phases = {name: self.machine.seconds(work) for name, work in rehearsal.phase_work.items()}
        phases["evaluate"] *= evaluations * held_out / (job.micro_batch or job.batch)
        return phases | {"train": steps * step}

    def documents(self, job: TrainJob) -> tuple[int, ...]:
        """The largest micro-batch, with the filler that makes it whole."""
        lengths = (self.extent.lengths or (job.context,)) * job.micro_batch
        filler = whole(sum(lengths)) - sum(lengths)
        return lengths + (filler,) * (filler > 0)


def process_bytes(kind: str, tensors: int, weights: int, growth: int) -> int:
    """What a process will hold on the device that computes beside its tensors, of which it has so many bytes."""
    if kind == "cuda":
        return int(BLOCKS * tensors)
    pool = install_pool()
    if pool is None:
        return resident_bytes() + growth + int(LOOSE_HEAP * (tensors - weights))
    return resident_bytes() - pool.resident_bytes + growth


def changed_slots(given: TrainJob, job: TrainJob) -> list[str]:
    """The slots that the planner may fill and has filled."""
    return [slot for slot in SLOTS if getattr(job, slot) != getattr(given, slot)]


def _cheaper(slot: str, spelling: str) -> bool:
    """Whether the dial is turned from its default towards its cheap end, where nothing was measured."""
    method, usual = (book.make(slot, text) for text in (spelling, _without_dial(slot, spelling)))
    if method is None or method.card.dial is None:
        return True  # other knobs than those that were measured
    knob, low, high = method.card.dial
    return (getattr(method, knob) - getattr(usual, knob)) * (high - low) < 0


def _without_dial(slot: str, spelling: str) -> str:
    """The method with its dial as it is by default, and its other knobs as they are."""
    method = book.make(slot, spelling)
    if method is None or method.card.dial is None:
        return spelling
    knob = method.card.dial[0]
    return str(dataclasses.replace(method, **{knob: getattr(type(method)(), knob)}))


def _differences(given: TrainJob, changed: TrainJob) -> tuple[str, ...]:
    if changed.micro_batch == given.batch:  # the default: all rows at once
        changed = dataclasses.replace(changed, micro_batch=given.micro_batch)
    names = [f.name for f in dataclasses.fields(given)]
    return tuple(f"{n}={getattr(changed, n)}" for n in names if getattr(given, n) != getattr(changed, n))
