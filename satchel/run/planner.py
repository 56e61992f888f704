"""The ladder: rehearse the job as it is; while it exceeds its budget, change what its peak is made of.

Rung by rung: smaller micro-batches (the result stays the same), then the methods whose card says that they save an
account of the peak, in slots that the user left at their default: exact ones before approximate ones, and among these
the one that changes least, which is the one that fits with the highest peak. The last rungs show what another kind of
job would need: an adapter instead of all weights. They are advice; a job is never changed into another kind.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from satchel.core import book
from satchel.core.errors import DoesNotFit, UserError
from satchel.core.job import TuneJob
from satchel.core.units import format_bytes, parse_bytes
from satchel.model.batch import whole
from satchel.model.config import ModelConfig
from satchel.model.source import find_source
from satchel.run.device import Device, device
from satchel.run.memory import install_pool, resident_bytes
from satchel.run.rehearse import Rehearsal, rehearse
from satchel.run.warm import warm_up

PROCESS = "process"  # the account of what is not tensors: Python, torch, compiled kernels
GROWTH = 40 << 20  # kernels that oneDNN makes for the job's own shapes, and the like; measured in bench/plan
MARGIN = 0.03  # of the job's tensors, on top of the prediction
LOOSE_HEAP = 0.65  # the C library's heap holds this much more than is live, beside the weights; measured in bench/plan
SLOTS = ("activations", "optimizer", "format")  # that the planner may fill
DEFAULTS = {f.name: f.default for f in dataclasses.fields(TuneJob)}


@dataclass(frozen=True)
class Rung:
    """One way to run the job."""

    changes: tuple[str, ...]  # what differs from the job as given, `activations=full`
    job: TuneJob
    rehearsal: Rehearsal
    peak_bytes: int  # of the whole process on the device that computes
    accounts: dict[str, int]  # of that peak
    seconds_per_step: float
    costs: str  # what the changes spend
    fits: bool
    advice: bool = False  # another kind of job: never chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("job", "rehearsal")}
        phases = {phase.name: {"peak_bytes": phase.peak_bytes, **phase.accounts} for phase in self.rehearsal.phases}
        return plain | {"job": self.job.to_dict(), "phases": phases, "tokens_per_step": self.rehearsal.tokens}


@dataclass(frozen=True)
class Plan:
    """The rungs in the order in which they were tried, and the one to run."""

    job: TuneJob
    budget: str
    budget_bytes: int
    device: str
    rungs: tuple[Rung, ...]
    chosen: Rung | None

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that would do, of the rungs that were tried."""
        return min(rung.peak_bytes for rung in self.rungs)

    def require(self) -> Rung:
        """The chosen rung. Raises DoesNotFit, with what would do."""
        if self.chosen:
            return self.chosen
        least = min(self.rungs, key=lambda rung: rung.peak_bytes)
        how = f" with {', '.join(least.changes)}" if least.changes else ""
        raise DoesNotFit(
            f"the job needs {format_bytes(self.rungs[0].peak_bytes)} and the budget is {self.budget}; "
            f"the smallest that would do is {format_bytes(least.peak_bytes)}{how}. `satchel plan tune` shows the ladder"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "job": self.job.to_dict(),
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "smallest_bytes": self.smallest_bytes,
            "chosen": self.rungs.index(self.chosen) if self.chosen else None,
            "rungs": [rung.to_dict() for rung in self.rungs],
        }


def plan(job: TuneJob, config: ModelConfig | None = None, lengths: tuple[int, ...] = ()) -> Plan:
    """Climb the ladder of a job. `lengths`: documents of its fullest row; default: one of the whole context.

    Reads the model's header, never its weights. Raises UserError where the job itself would.
    """
    config = config or _config(job.model)
    machine = device(job.device)
    free = machine.free_bytes() + (resident_bytes() if machine.kind == "cpu" else 0)
    budget = free if job.memory == "auto" else parse_bytes(job.memory)
    label = f"{format_bytes(budget)} (free now)" if job.memory == "auto" else format_bytes(budget)
    install_pool() if machine.kind == "cpu" else None
    warm_up(job, machine.kind)
    ladder = _Ladder(job, config, machine, budget, lengths)
    chosen = ladder.climb()
    return Plan(job, label, budget, machine.name, tuple(ladder.rungs), chosen)


def _config(model: str) -> ModelConfig:
    """The model's configuration; a folder that holds nothing but a config.json will do."""
    alone = Path(model) / "config.json"
    if alone.exists() and not any(alone.parent.glob("*.safetensors*")):
        return ModelConfig.from_hf(json.loads(alone.read_text(encoding="utf8")))
    return find_source(model).config


@dataclass
class _Ladder:
    job: TuneJob
    config: ModelConfig
    machine: Device
    budget: int
    lengths: tuple[int, ...]
    rungs: list[Rung] = field(default_factory=list)
    tried: dict[TuneJob, Rung] = field(default_factory=dict)

    def climb(self) -> Rung | None:
        """Try until something fits; None if nothing of the job's own kind does."""
        if found := self._fit(self.job):
            return found
        base = self.job
        for fidelity in ("exact", "approx"):
            fitting, rungs = [], []
            for changed in self._changes(base, fidelity):
                rung = self._fit(changed)
                fitting += [rung] if rung else []
                rungs.append(self.rungs[-1])
            if fitting:
                return max(fitting, key=lambda rung: rung.peak_bytes)
            base = min([r.job for r in rungs] or [base], key=lambda job: self._peak(job))
        while (changed := self._least(base)) is not None:  # two approximate methods, or three
            if found := self._fit(changed):
                return found
            base = changed
        self._advise(base)
        return None

    def _fit(self, job: TuneJob) -> Rung | None:
        """The job with the largest micro-batch that fits, which is noted as a rung; None (and a rung) if none fits."""
        whole = self._rung(job)
        if whole.fits or job.micro_batch:
            return self._note(whole)
        single = self._rung(dataclasses.replace(job, micro_batch=1))
        if not single.fits or job.batch == 1:
            return self._note(single if single.peak_bytes < whole.peak_bytes else whole)
        each = (whole.peak_bytes - single.peak_bytes) / (job.batch - 1)
        rows = min(int((self.budget - single.peak_bytes) / each) + 1, job.batch - 1)
        while rows > 1:
            rung = self._rung(dataclasses.replace(job, micro_batch=rows))
            if rung.fits:
                return self._note(rung)
            rows -= max(1, rows // 8)
        return self._note(single)

    def _note(self, rung: Rung) -> Rung | None:
        self.rungs.append(rung)
        return rung if rung.fits and not rung.advice else None

    def _changes(self, job: TuneJob, fidelity: str) -> Iterator[TuneJob]:
        """The job with one more slot filled, for each method of that fidelity that saves what the peak is made of."""
        heavy = {account for account, size in self._rung(job).accounts.items() if size > 0}
        for entry in book.entries():
            free = entry.slot in SLOTS and getattr(job, entry.slot) == DEFAULTS[entry.slot] != entry.name
            allowed = entry.slot != "format" or job.adapter != "none"
            if free and allowed and entry.card.fidelity == fidelity and heavy & set(entry.card.saves):
                changed = dataclasses.replace(job, **{entry.slot: entry.name})
                if self._possible(changed):
                    yield changed

    def _possible(self, job: TuneJob) -> bool:
        """Whether a method that the user did not ask for suits this model: GaLore projects no matrix of a thin LoRA."""
        try:
            self._peak(job)
        except UserError:
            return False
        return True

    def _least(self, job: TuneJob) -> TuneJob | None:
        """The job with the one more approximate method that brings the peak down the most; None if none does."""
        best = min(self._changes(job, "approx"), key=self._peak, default=None)
        return best if best is not None and self._peak(best) < self._peak(job) else None

    def _advise(self, base: TuneJob) -> None:
        if self.job.adapter == "none":
            for activations in dict.fromkeys((self.job.activations, base.activations)):
                changed = dataclasses.replace(
                    self.job, adapter="lora", activations=activations, optimizer=DEFAULTS["optimizer"]
                )
                if self._fit(changed) or self.rungs[-1].fits:
                    break
            self.rungs[-1] = dataclasses.replace(self.rungs[-1], advice=True)

    def _peak(self, job: TuneJob) -> int:
        return self._rung(dataclasses.replace(job, micro_batch=job.micro_batch or 1)).peak_bytes

    def _rung(self, job: TuneJob) -> Rung:
        job = dataclasses.replace(job, micro_batch=min(job.micro_batch or job.batch, job.batch))
        if job not in self.tried:
            self.tried[job] = self._rehearse(job)
        return self.tried[job]

    def _rehearse(self, job: TuneJob) -> Rung:
        rehearsal = rehearse(job, self.config, self._documents(job), self.machine.kind)
        accounts = rehearsal.peak.accounts | self._process(rehearsal)
        peak = sum(accounts.values())
        return Rung(
            changes=_differences(self.job, job),
            job=job,
            rehearsal=rehearsal,
            peak_bytes=peak,
            accounts=accounts,
            seconds_per_step=self.machine.seconds(rehearsal.work),
            costs=", ".join(_costs(self.job, job)),
            fits=peak + MARGIN * rehearsal.peak.peak_bytes <= self.budget,
        )

    def _documents(self, job: TuneJob) -> tuple[int, ...]:
        """The largest micro-batch, with the filler that makes it whole."""
        lengths = (self.lengths or (job.context,)) * job.micro_batch
        filler = whole(sum(lengths)) - sum(lengths)
        return lengths + (filler,) * (filler > 0)

    def _process(self, rehearsal: Rehearsal) -> dict[str, int]:
        """What the process holds beside its tensors, on the device that computes."""
        if self.machine.kind == "cuda":
            return {}
        pool, loose = install_pool(), 0
        if pool is None:
            loose = int(LOOSE_HEAP * (rehearsal.peak.peak_bytes - rehearsal.peak.accounts.get("weights", 0)))
        return {PROCESS: resident_bytes() - (pool.resident_bytes if pool else 0) + GROWTH + loose}


def _differences(given: TuneJob, changed: TuneJob) -> tuple[str, ...]:
    if changed.micro_batch == given.batch:  # the default: all rows at once
        changed = dataclasses.replace(changed, micro_batch=given.micro_batch)
    names = [f.name for f in dataclasses.fields(TuneJob)]
    return tuple(f"{n}={getattr(changed, n)}" for n in names if getattr(given, n) != getattr(changed, n))


def _costs(given: TuneJob, changed: TuneJob) -> Iterator[str]:
    for slot in ("adapter", *SLOTS):
        spelling = getattr(changed, slot)
        if spelling != getattr(given, slot):
            spends = book.find(slot, spelling.partition(":")[0]).card.spends
            yield f"{spelling}: {'+'.join(spends) or 'nothing'}"
    if (changed.micro_batch or changed.batch) < (given.micro_batch or given.batch):
        yield "smaller matrix products"
