"""`satchel plan tune` and `satchel plan pretrain`: the ladder of a job, rung by rung."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.text import Text

from satchel.cli.console import out, table
from satchel.cli.options import takes_job
from satchel.core.card import ACCOUNTS
from satchel.core.job import PretrainJob, TuneJob
from satchel.core.report import Report
from satchel.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.status import Status

    from satchel.run.extend import Phase
    from satchel.run.planner import Plan, Rung

WAITING = "rehearsing the job; on first use this machine's speed is measured too, which takes a minute"


class Waiting(Report):
    """Shows which way to run a job was rehearsed last, while the plan is made."""

    def __init__(self, status: Status) -> None:
        self.status, self.count = status, 0

    def rung(self, rung: Rung) -> None:
        self.count += 1
        what, peak = ", ".join(rung.changes) or "the job as given", format_bytes(rung.peak_bytes)
        self.status.update(Text(f"rehearsed {self.count}: {what}: {peak}"))


Explain = Annotated[bool, typer.Option("--explain", help="Show the peak of each phase, and what makes it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@takes_job
def plan_tune(job: TuneJob, explain: Explain = False, as_json: AsJson = False) -> None:
    """Rehearse a tuning job without allocating it: does it fit, what would make it fit, and at what cost?"""
    _plan(job, explain, as_json)


@takes_job
def plan_pretrain(job: PretrainJob, explain: Explain = False, as_json: AsJson = False) -> None:
    """Rehearse a pre-training job without allocating it: does it fit, what would make it fit, and at what cost?"""
    _plan(job, explain, as_json)


def _plan(job: TuneJob | PretrainJob, explain: bool, as_json: bool) -> None:
    """Print the plan; exit code 2 if nothing fits."""
    from satchel.run.planner import plan
    from satchel.run.records import require_source

    for path in job.paths:
        require_source(path)
    if as_json:
        made = plan(job)
    else:
        with out.status(WAITING) as status:
            made = plan(job, report=Waiting(status))
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        print_plan(made, explain)
    if made.chosen is None:
        raise typer.Exit(2)


SHOWN_SECONDS = 0.5  # what takes less is not said
NAMES_WIDTH, COLUMN_WIDTH = 14, 12  # characters, spaces between columns included
PHASES = {
    "load": "the weights arrive matrix by matrix, then adapters are put on them",
    "train": "what the forward pass keeps meets gradients and the optimizer's state",
    "evaluate": "a forward pass that keeps nothing, beside all that training holds",
    "save": "tensors are written one by one from where they are",
    "check": "what the model predicts of a short prompt, before and after merging",
    "merge": "one matrix at a time, beside the model",
}


def print_plan(plan: Plan, explain: bool = False) -> None:
    """The ladder, then the verdict; `explain` adds each phase's peak on the rung that was reached."""
    out.print(Text(f"{plan.job.model} on {plan.device}, budget {plan.budget}\n"))
    _print_ladder(plan)
    out.print(_verdict(plan))
    if explain and plan.rungs:
        rung = plan.chosen or plan.rungs[-1]
        out.print(Text(f"\nThe phases of rung {plan.rungs.index(rung) + 1}, tensors alone\n"))
        _print_phases(rung)
        _print_addresses(rung)


def _print_ladder(plan: Plan) -> None:
    columns = [
        Column(str(number), rung.accounts, rung.peak_bytes, _times(rung), _mark(rung, plan))
        for number, rung in enumerate(plan.rungs, 1)
    ]
    _print_columns("rung", columns, ("step", "run") if columns[0].times[1:] else ("step",))
    changes = table("", "what changes", "what that costs")
    for column, rung in zip(columns, plan.rungs, strict=True):
        changes.add_row(
            column.name, Text(", ".join(rung.changes) or "nothing: the job as given"), Text(rung.costs or "-")
        )
    out.print("", changes, sep="\n")


def _times(rung: Rung) -> tuple[str, ...]:
    """Of a step and, if the number of steps is known, of the run."""
    run = (sum(rung.seconds.values()),) if rung.seconds else ()
    return tuple(map(format_seconds, (rung.seconds_per_step, *run)))


def _mark(rung: Rung, plan: Plan) -> Text:
    if rung is plan.chosen:
        return Text("chosen", "bold green")
    if not rung.fits:
        return Text("too big", "red")
    return Text("would fit", "yellow") if rung.advice else Text("fits", "green")


def _verdict(plan: Plan) -> Text:
    if plan.chosen is None:
        return Text(
            "\n" + "\n".join(f"{line}." for line in (f"Nothing of this kind fits {plan.budget}", *plan.cures())), "red"
        )
    changes = ", ".join(plan.chosen.changes)
    verdict = f"\nFits {plan.budget} {f'with {changes}' if changes else 'as it is'}."
    if plan.chosen.seconds:
        parts = sorted(plan.chosen.seconds.items(), key=lambda part: -part[1])
        verdict += " Time: " + ", ".join(f"{format_seconds(s)} {name}" for name, s in parts if s >= SHOWN_SECONDS) + "."
    if plan.smallest and plan.smallest_bytes:
        how = f", with {', '.join(plan.smallest.changes)}" if plan.smallest.changes else ""
        verdict += f"\nThe smallest budget that would do is {format_bytes(plan.smallest_bytes)}{how}."
    return Text(verdict)


def _print_phases(rung: Rung) -> None:
    """Each phase's peak by account, tensors alone; the highest is the job's."""
    phases = rung.rehearsal.phases
    _print_columns("phase", [Column(phase.name, phase.accounts, phase.peak_bytes) for phase in phases])
    reasons = table("", "what stands at its peak")
    for phase in phases:
        reasons.add_row(phase.name, Text(_why(phase)))
    out.print("", reasons, sep="\n")


def _print_addresses(rung: Rung) -> None:
    """What lies in a second tier, and what fixed addresses would need, if SciPy is there to find them."""
    from satchel.run.layout import two_levels

    if rung.rehearsal.second_tier_bytes:
        out.print(f"\nIn the second tier: {format_bytes(rung.rehearsal.second_tier_bytes)} of activations.")
    if rung.rehearsal.step and find_spec("scipy"):
        layouts = two_levels(rung.rehearsal.step)
        for what, plan in zip(("passes within a layer", "a step of few layers makes"), layouts, strict=True):
            out.print(
                f"\nFixed addresses for what {what}: {format_bytes(plan.peak_bytes)}; "
                f"best fit {format_bytes(plan.best_fit_bytes)}, alive at once {format_bytes(plan.least_bytes)}."
            )


def _why(phase: Phase) -> str:
    name, size = max(phase.accounts.items(), key=lambda item: item[1], default=("nothing", 0))
    share = size / max(phase.peak_bytes, 1)
    return f"{share:.0%} {name}; {PHASES.get(phase.name, '')}".rstrip("; ")


class Column(NamedTuple):
    """One rung or phase: what it holds by account, and what is said of it below."""

    name: str
    accounts: dict[str, int]
    peak_bytes: int
    times: tuple[str, ...] = ()
    mark: Text = Text("")


def _print_columns(title: str, columns: Sequence[Column], times: Sequence[str] = ()) -> None:
    """Accounts down, rungs or phases across, as many side by side as the terminal is wide."""
    held = {name for column in columns for name, size in column.accounts.items() if size}
    accounts = [name for name in ACCOUNTS if name in held] + sorted(held - set(ACCOUNTS))
    across = max(1, (out.width - NAMES_WIDTH) // COLUMN_WIDTH)
    for start in range(0, len(columns), across):
        shown = columns[start : start + across]
        names = [column.name for column in shown]
        rows = table(title, *names, right=tuple(names))
        for account in accounts:
            rows.add_row(account, *(_size(column.accounts.get(account)) for column in shown))
        rows.add_row("peak", *(Text(format_bytes(column.peak_bytes), "bold") for column in shown))
        for number, label in enumerate(times):
            rows.add_row(label, *(column.times[number] for column in shown))
        if any(column.mark for column in shown):
            rows.add_row("", *(column.mark for column in shown))
        out.print(rows)


def _size(count: int | None) -> str:
    return format_bytes(count) if count else "-"
