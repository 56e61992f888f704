"""`satchel plan tune`: the ladder of a job, rung by rung."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from satchel.cli.console import out, table
from satchel.cli.options import takes_job
from satchel.core.card import ACCOUNTS
from satchel.core.job import TuneJob
from satchel.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from satchel.run.extend import Phase
    from satchel.run.planner import Plan, Rung


@takes_job
def plan_tune(
    job: TuneJob,
    explain: Annotated[bool, typer.Option("--explain", help="Show the peak of each phase, and what makes it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rehearse a tuning job without allocating it: does it fit, what would make it fit, and at what cost?"""
    from satchel.run.planner import plan

    made = plan(job)
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        print_plan(made, explain)
    if made.chosen is None:
        raise typer.Exit(2)


PHASES = {
    "load": "the weights arrive matrix by matrix, then adapters are put on them",
    "train": "what the forward pass keeps meets gradients and the optimizer's state",
    "evaluate": "a forward pass that keeps nothing, beside all that training holds",
    "save": "tensors are written one by one from where they are",
    "merge": "one matrix at a time, beside the model",
}


def print_plan(plan: Plan, explain: bool = False) -> None:
    """The ladder as a table, then the verdict; `explain` adds each phase's peak on the rung that was reached."""
    out.print(Text(f"{plan.job.model} on {plan.device}, budget {plan.budget}\n"), _ladder(plan), sep="\n")
    out.print(_verdict(plan))
    if explain and plan.rungs:
        out.print("", _phases(plan.chosen or plan.rungs[-1]), sep="\n")


def _ladder(plan: Plan) -> Table:
    accounts = _accounts(rung.accounts for rung in plan.rungs)
    rows = table("", "rung", "peak", *accounts, "step", "costs", right=("peak", "step", *accounts))
    for rung in plan.rungs:
        change = ", ".join(rung.changes) or "the job as given"
        seconds = format_seconds(rung.seconds_per_step)
        split = _split(rung.accounts, accounts)
        rows.add_row(_mark(rung, plan), Text(change), format_bytes(rung.peak_bytes), *split, seconds, Text(rung.costs))
    return rows


def _mark(rung: Rung, plan: Plan) -> Text:
    if rung is plan.chosen:
        return Text("chosen", "bold green")
    if not rung.fits:
        return Text("too big", "red")
    return Text("would fit", "yellow") if rung.advice else Text("fits", "green")


def _verdict(plan: Plan) -> Text:
    smallest = format_bytes(plan.smallest_bytes)
    if plan.chosen is None:
        advice = next((rung for rung in plan.rungs if rung.advice and rung.fits), None)
        cure = f"another kind of job would: {', '.join(advice.changes)}" if advice else f"give --memory {smallest}"
        return Text(f"\nNothing of this kind fits {plan.budget}; {cure}.", "red")
    changes = ", ".join(plan.chosen.changes)
    how = f"with {changes}" if changes else "as it is"
    return Text(f"\nFits {plan.budget} {how}. The smallest budget that would do: {smallest}.")


def _phases(rung: Rung) -> Table:
    """Each phase's peak by account; the phase with the highest peak is the job's."""
    phases = rung.rehearsal.phases
    accounts = _accounts(phase.accounts for phase in phases)
    rows = table("phase", "peak", *accounts, "why", right=("peak", *accounts))
    for phase in phases:
        split = _split(phase.accounts, accounts)
        rows.add_row(phase.name, format_bytes(phase.peak_bytes), *split, Text(_why(phase)))
    return rows


def _accounts(peaks: Iterable[dict[str, int]]) -> list[str]:
    """The accounts that hold anything in one of the peaks: those of the cards in their order, then others."""
    held = {name for peak in peaks for name, size in peak.items() if size}
    return [name for name in ACCOUNTS if name in held] + sorted(held - set(ACCOUNTS))


def _split(peak: dict[str, int], accounts: Iterable[str]) -> list[str]:
    return [format_bytes(peak[name]) if peak.get(name) else "-" for name in accounts]


def _why(phase: Phase) -> str:
    name, size = max(phase.accounts.items(), key=lambda item: item[1], default=("nothing", 0))
    share = size / max(phase.peak_bytes, 1)
    return f"{name} are {share:.0%}; {PHASES.get(phase.name, '')}".rstrip("; ")
