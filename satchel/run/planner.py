"""Does a job fit its budget, and what makes it fit? The answer is a plan: the rungs of a ladder, one of them chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.core.errors import DoesNotFit
from satchel.core.job import TrainJob
from satchel.core.report import SILENT, Report
from satchel.core.units import format_bytes, parse_bytes
from satchel.model.config import ModelConfig
from satchel.model.source import find_source
from satchel.run.device import device
from satchel.run.governor import Governor, ran_out
from satchel.run.ladder import Ladder
from satchel.run.measured import read_measured
from satchel.run.memory import Pool, install_pool, resident_bytes
from satchel.run.rung import GROWTH, PROCESS, Extent, Pricing, Rung
from satchel.run.warm import Samples, noise, settle, warm_up

DRIFT = 40 << 20  # the process differs from one that only plans: tokenizer and data; 25 MiB measured on the demo
SETTLED = 16 << 20  # what a process still grows by after `settle`: 4 to 12 MiB measured
ROUNDING = 1.005  # what is printed has three digits, and has to do when it is typed


@dataclass(frozen=True)
class Plan:
    """The rungs in the order in which they were tried, and the one to run."""

    job: TrainJob
    budget: str
    budget_bytes: int
    device: str
    rungs: tuple[Rung, ...]
    chosen: Rung | None
    smallest: Rung | None = None  # of this kind of job, the one that takes the least; None: not looked for

    @property
    def smallest_bytes(self) -> int | None:
        """A budget that would do for this kind of job, and under which no rung is known; None: not looked for."""
        return _sufficient(self.smallest) if self.smallest else None

    @property
    def advice(self) -> Rung | None:
        """Another kind of job, if nothing of this kind fits and there is one."""
        return next((rung for rung in self.rungs if rung.advice), None)

    @property
    def advice_bytes(self) -> int | None:
        """A budget that would do for the advice."""
        return _sufficient(self.advice) if self.advice else None

    def require(self) -> Rung:
        """The chosen rung. Raises DoesNotFit, with what would do."""
        if self.chosen:
            return self.chosen
        needs = format_bytes(self.rungs[0].peak_bytes)
        cures = ". ".join([f"the job needs {needs} and the budget is {self.budget}", *self.cures()])
        raise DoesNotFit(f"{cures}. `satchel plan {self.job.verb}` shows the ladder")

    def cures(self) -> list[str]:
        """What would do where nothing of this kind fits, as sentences without their dots."""
        cures = []
        if self.smallest and self.smallest_bytes:
            how = f", with {', '.join(self.smallest.changes)}" if self.smallest.changes else ""
            cures.append(f"The smallest budget that would do for it is {format_bytes(self.smallest_bytes)}{how}")
        if self.advice and self.advice_bytes:
            what = ", ".join(self.advice.changes)
            fits = "would fit" if self.advice.fits else f"would need {format_bytes(self.advice_bytes)}"
            cures.append(f"Another kind of job {fits}: {what}")
        return cures

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; docs/PLAN.md says what they are."""
        return {
            "job": self.job.to_dict(),
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "smallest_bytes": self.smallest_bytes,
            "smallest_changes": list(self.smallest.changes) if self.smallest else None,
            "advice_bytes": self.advice_bytes,
            "chosen": self.rungs.index(self.chosen) if self.chosen else None,
            "rungs": [rung.to_dict() for rung in self.rungs],
        }


def plan(
    job: TrainJob,
    config: ModelConfig | None = None,
    extent: Extent | None = None,
    look_for_smallest: bool = True,
    samples: Callable[[int], Samples] | None = None,
    report: Report = SILENT,
) -> Plan:
    """Climb the ladder of a job. `extent`: what its data says of it; by default rows of the whole context.
    `samples`: batches of the sizes that a run with so many rows at once sees; by default one of full rows. `report` is
    told of every rung.

    Near the edge of the budget the process is brought to the size that it will have with the job, and the ladder is
    climbed anew. Reads the model's header, never its weights. The smallest budget costs some rehearsals more, unless
    nothing fits, where it is always found. Raises UserError where the job itself would.
    """
    config = config or _config(job.model)
    machine = device(job.device)
    free = machine.free_bytes() + (resident_bytes() if machine.kind == "cpu" else 0)
    budget = free if job.memory == "auto" else parse_bytes(job.memory)
    label = f"{format_bytes(budget)} (free now)" if job.memory == "auto" else format_bytes(budget)
    pool = install_pool() if machine.kind == "cpu" else None
    warm_up(job, config, machine.kind)
    machine = machine.now()
    if pool:
        pool.trim()  # pages that were never touched would be taken for a part of what is resident
    pricing = Pricing(job, config, machine, budget, extent or Extent(), read_measured(), report=report)
    ladder = Ladder(job, pricing)
    chosen, smallest = _climbed(ladder, look_for_smallest)
    near = chosen or smallest
    if pool and near and abs(near.peak_bytes - budget) <= GROWTH:
        growth = SETTLED if _settled(pricing, near.job, pool, samples) else GROWTH
        ladder = Ladder(job, dataclasses.replace(pricing, growth=growth))
        chosen, smallest = _climbed(ladder, look_for_smallest)
    if not chosen:
        ladder.advise()
    return Plan(job, label, budget, machine.name, tuple(ladder.rungs), chosen, smallest)


def _climbed(ladder: Ladder, look_for_smallest: bool) -> tuple[Rung | None, Rung | None]:
    """The rung to run and the smallest; None for what there is not, or what nobody asks for."""
    chosen = ladder.climb()
    return chosen, ladder.smallest() if look_for_smallest or not chosen else None


def _settled(pricing: Pricing, job: TrainJob, pool: Pool, samples: Callable[[int], Samples] | None) -> bool:
    """Have the process grow as it would with the job, inside the budget; False if not even one layer of it fits."""
    full = noise(pricing.config.vocab, pricing.documents(job))
    sizes = samples(job.micro_batch) if samples else Samples([full], [full])
    governor = Governor(pricing.machine.kind, pricing.budget, pool)
    governor.begin()
    try:
        settle(job, pricing.config, pricing.machine.kind, sizes)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False
    finally:
        governor.end()
        governor.relax()
    return True


def _config(model: str) -> ModelConfig:
    """The model's configuration; a folder that holds nothing but a config.json will do."""
    alone = Path(model) / "config.json"
    if alone.exists() and not any(alone.parent.glob("*.safetensors*")):
        return ModelConfig.from_hf(json.loads(alone.read_text(encoding="utf8")))
    return find_source(model).config


def _sufficient(rung: Rung) -> int:
    """A budget of three digits that does for a rung in another process than this."""
    needs = (rung.peak_bytes + DRIFT * (PROCESS in rung.accounts)) * ROUNDING
    return parse_bytes(format_bytes(needs))
