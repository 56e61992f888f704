"""The ladder: from the job as given down to the first way to run it that fits its budget.

1. Smaller micro-batches, which leave the result as it is; so at every later rung.
2. Exact methods that save an account of the peak, in slots that the user left at their default; the quickest that
   fits.
3. On top of the lightest of these, approximate methods, in every form that a bench measured, in the order of the
   held-out loss that it found; those without a measurement come behind, the one that changes the peak least first.
   One that could not fit if it saved all of what it is there to save is not tried. Until one fits, the lightest stays
   and the next slot is filled; an exact method makes room for them in its own. If nothing fits, the same again with
   dials at their cheap end.
4. What was found is improved slot by slot: a change that is not needed after all goes, a method of better measured
   quality comes in its place, and dials are turned, by bisection, to the most neutral value that fits.

The last rung may show another kind of job, an adapter instead of all weights: advice, never chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, prod, sqrt

from satchel.core import book
from satchel.core.book import Entry
from satchel.core.errors import UserError
from satchel.core.job import TrainJob
from satchel.core.seams import Method
from satchel.run.rung import DEFAULTS, SLOTS, Pricing, Rung, changed_slots

WORTH = 0.05  # a method is tried if it saves an account that makes at least this share of the peak
TURNS = 4  # rehearsals to turn one dial
LIGHT = 3  # methods that are rehearsed to find the lightest: those that took the least memory in a bench


@dataclass
class Ladder:
    """One climb. `rungs` are those that were tried, in their order."""

    job: TrainJob
    pricing: Pricing
    rungs: list[Rung] = field(default_factory=list)
    known: dict[TrainJob, Rung | None] = field(default_factory=dict)  # None: the model does not admit the job

    def climb(self) -> Rung | None:
        """The rung to run; None if nothing of the job's own kind fits. Raises UserError where the job itself would."""
        plain = self._rows(self.job, self.job.batch)
        self.known[plain] = self.known.get(plain) or self.pricing.rung(plain)
        if (given := self._noted(self._largest(self.job))).fits:
            return given
        options = self._options(self.job, "exact")
        if fitting := [rung for rung in map(self._fit, options) if rung]:
            return self._noted(min(map(self._improved, fitting), key=lambda rung: rung.seconds_per_step))
        exact = self._lightest([self.job, *options])
        for cheap in (False, True):
            base = exact
            while options := self._options(base, "approx", cheap=cheap):
                if found := next(filter(None, map(self._fit, self._hopeful(base, options))), None):
                    return self._noted(self._improved(found))
                if (lighter := self._lightest([base, *self._light(options)])) == base:
                    break
                base = lighter
        return None

    def smallest(self) -> Rung:
        """The lightest rung of the job's own kind: in each slot what brings the peak down the most."""
        job = self.job
        for fidelity in ("exact", "approx"):
            while options := self._options(job, fidelity, cheap=True):
                lighter = self._lightest([job, *self._light(options)])
                if lighter == job:
                    break
                job = lighter
        own = [self._least(job), *(rung for rung in self.rungs if not rung.advice)]
        return min(own, key=lambda rung: rung.peak_bytes)

    def advise(self) -> None:
        """Add what another kind of job would need, an adapter where all weights were to be tuned: never chosen."""
        if self.job.adapter != "none":
            return
        try:
            adapted = dataclasses.replace(self.job, adapter="lora", optimizer=DEFAULTS["optimizer"])
        except UserError:  # random weights take no adapter
            return
        other = Ladder(adapted, self.pricing, known=self.known)
        self.rungs.append(dataclasses.replace(other.climb() or other.smallest(), advice=True))

    def _fit(self, job: TrainJob) -> Rung | None:
        """The job with the largest micro-batch that fits, which is noted as a rung; None (and a rung) if none fits."""
        if self._small(job) is None:
            return None
        rung = self._noted(self._largest(job))
        return rung if rung.fits else None

    def _largest(self, job: TrainJob) -> Rung:
        """The job with the largest micro-batch that fits, or with one row at a time."""
        if self.known.get(self._rows(job, 1)) and not (small := self._least(job)).fits:
            return small
        whole, single = self._require(self._rows(job, job.batch)), self._rows(job, 1)
        if whole.fits or whole.job == single:
            return whole
        one = self._require(single)
        each = max((whole.peak_bytes - one.peak_bytes) / (job.batch - 1), 1)
        rows = min(int((self.pricing.budget - one.peak_bytes) / each) + 1, job.batch - 1)
        while rows > 1 and one.fits:
            rung = self._require(self._rows(job, rows))
            if rung.fits:
                return rung
            rows -= max(1, rows // 8)
        return one if one.peak_bytes < whole.peak_bytes else whole

    def _options(
        self, job: TrainJob, fidelity: str, slots: Sequence[str] = SLOTS, cheap: bool = False
    ) -> list[TrainJob]:
        """The job with one more slot filled by a method of that fidelity that saves what the peak is made of.

        Best first: by measured loss, then unmeasured ones by how little they change; `cheap`: then with their dials at
        the cheap end.
        """
        rung = self._least(job)
        heavy = {account for account, size in rung.accounts.items() if size >= WORTH * rung.peak_bytes}
        found: list[tuple[tuple, TrainJob]] = []
        for entry in book.entries():
            free = entry.slot in slots and self._free(job, entry.slot, fidelity)
            allowed = entry.slot != "format" or job.adapter != "none"
            if free and allowed and entry.card.fidelity == fidelity:
                found += self._spelled(job, entry, heavy, cheap)
        return [changed for _, changed in sorted(found, key=lambda item: item[0])]

    def _free(self, job: TrainJob, slot: str, fidelity: str) -> bool:
        """Whether a slot is the ladder's to fill: at its default, or filled by it exactly where that does not do."""
        if getattr(job, slot) == DEFAULTS[slot]:
            return True
        ours = getattr(self.job, slot) == DEFAULTS[slot]
        return ours and fidelity == "approx" and _entry(job, slot).card.fidelity == "exact"

    def _hopeful(self, job: TrainJob, options: list[TrainJob]) -> Iterator[TrainJob]:
        """The options that would fit if the method that they add saved all of every account that it saves."""
        rung = self._least(job)
        for option in options:
            (slot,) = (slot for slot in SLOTS if getattr(option, slot) != getattr(job, slot))
            saved = sum(rung.accounts.get(account, 0) for account in set(_method(option, slot).saves))
            if rung.peak_bytes - saved <= self.pricing.budget:
                yield option

    def _light(self, options: list[TrainJob]) -> list[TrainJob]:
        """The options among which the lightest is looked for: those rehearsed before, and a few that measured light."""

        def memory(job: TrainJob) -> float:
            found = [self.pricing.measurement(slot, getattr(job, slot)) for slot in SLOTS]
            return prod(each.memory for each in found if each)

        light = sorted(options, key=memory)[:LIGHT]
        return [job for job in options if job in light or self._rows(job, 1) in self.known]

    def _spelled(self, job: TrainJob, entry: Entry, heavy: set[str], cheap: bool) -> Iterator[tuple[tuple, TrainJob]]:
        """A method at its defaults, in every form that was measured and, if `cheap`, with its dial at that end: those
        that save of a heavy account, each with its place in the order."""
        slot, approx = entry.slot, entry.card.fidelity == "approx"
        texts = dict.fromkeys([entry.name, *self.pricing.forms(entry)], 0)
        if cheap and entry.card.dial and approx:
            texts = {_turn(slot, text, entry.card.dial[1]): 1 for text in texts} | texts
        for text, number in texts.items():
            changed = dataclasses.replace(job, **{slot: text})
            if text == DEFAULTS[slot] or not heavy & set(_method(changed, slot).saves):
                continue
            found = self.pricing.measurement(slot, text)
            if found and approx:  # rehearsed when its turn comes
                yield (number, found.loss, found.memory), changed
            elif rung := self._small(changed):
                yield (number, *((inf, -rung.peak_bytes) if approx else (1.0, rung.seconds_per_step))), changed

    def _improved(self, rung: Rung) -> Rung:
        """The rung with each changed slot as near to the given job as the budget allows: first what costs quality."""
        for fidelity in ("approx", "exact"):
            for slot in changed_slots(self.job, rung.job):
                if _entry(rung.job, slot).card.fidelity == fidelity:
                    rung = self._turned(self._better(rung, slot), slot)
        return rung

    def _better(self, rung: Rung, slot: str) -> Rung:
        """The rung with the slot at its default or filled by a better method, if that fits too."""
        bare = dataclasses.replace(rung.job, micro_batch=self.job.micro_batch, **{slot: getattr(self.job, slot)})
        for job in (bare, *self._options(bare, _entry(rung.job, slot).card.fidelity, (slot,))):
            if getattr(job, slot) == getattr(rung.job, slot):
                break
            if self._small(job) and (other := self._largest(job)).fits:
                return other
        return rung

    def _turned(self, rung: Rung, slot: str) -> Rung:
        """The rung with the dial of its method in a slot at the most neutral value that fits with one row at a time."""
        spelling = getattr(rung.job, slot)
        if spelling == getattr(self.job, slot) or (dial := (card := _entry(rung.job, slot).card).dial) is None:
            return rung

        def at(value: float) -> TrainJob:
            changed = {"micro_batch": self.job.micro_batch, slot: _turn(slot, spelling, value)}
            return dataclasses.replace(rung.job, **changed)

        def fits(value: float) -> bool:
            small = self._small(at(value))
            return small is not None and small.fits

        value = getattr(book.make(slot, spelling), dial[0])
        value = dial[1] if value is None else value  # a method that turns its dial itself fits at the cheap end too
        found = bisect(fits, value, dial[2])
        best = rung if found == value else self._largest(at(found))
        slower = best.seconds_per_step > rung.seconds_per_step
        return rung if card.fidelity == "exact" and slower else best

    def _noted(self, rung: Rung) -> Rung:
        if rung not in self.rungs:
            self.rungs.append(rung)
        return rung

    def _lightest(self, jobs: list[TrainJob]) -> TrainJob:
        return min(filter(self._small, jobs), key=lambda job: self._least(job).peak_bytes)

    def _small(self, job: TrainJob) -> Rung | None:
        """The lightest rung of a job, if the model admits it: one row at a time, or all where that may take less; or as
        many as the user asked for."""
        one = self._at(self._rows(job, 1))
        if one is None or not book.make("optimizer", job.optimizer).undivided:
            return one
        return min(one, self._require(self._rows(job, job.batch)), key=lambda rung: rung.peak_bytes)

    def _least(self, job: TrainJob) -> Rung:
        rung = self._small(job)
        assert rung is not None, f"{job} was found to be no job of this model"
        return rung

    def _rows(self, job: TrainJob, rows: int) -> TrainJob:
        return dataclasses.replace(job, micro_batch=min(self.job.micro_batch or rows, job.batch))

    def _require(self, job: TrainJob) -> Rung:
        rung = self._at(job)
        assert rung is not None, f"{job} was found to be no job of this model"
        return rung

    def _at(self, job: TrainJob) -> Rung | None:
        """The rung of a job; None if the model does not admit it: GaLore projects no matrix of a thin LoRA."""
        if job not in self.known:
            try:
                self.known[job] = self.pricing.rung(job)
            except UserError:
                self.known[job] = None
        return self.known[job]


def bisect(fits: Callable[[float], bool], value: float, neutral: float) -> float:
    """The value nearest to `neutral` that was seen to fit, starting from one that does, in `TURNS` tries.

    What is 1 or more, such as a rank, is halved by factors; a share by differences.
    """
    too_far = neutral
    if value == neutral or fits(neutral):
        return neutral
    for _ in range(TURNS - 1):
        middle = sqrt(value * too_far) if min(value, too_far) >= 1 else (value + too_far) / 2
        if fits(middle):
            value = middle
        else:
            too_far = middle
    return value


def _entry(job: TrainJob, slot: str) -> Entry:
    return book.find(slot, getattr(job, slot).partition(":")[0])


def _method(job: TrainJob, slot: str) -> Method:
    method = book.make(slot, getattr(job, slot))
    assert method is not None
    return method


def _turn(slot: str, spelling: str, value: float) -> str:
    """The method with its dial at a value, as the knob's type has it, and its other knobs as they are."""
    method = book.make(slot, spelling)
    assert method is not None and method.card.dial is not None
    entry, name = book.find(slot, method.name), method.card.dial[0]
    knob = next(knob for knob in entry.knobs if knob.name == name)
    return str(dataclasses.replace(method, **{name: round(value) if knob.kind == "int" else float(f"{value:.3g}")}))
