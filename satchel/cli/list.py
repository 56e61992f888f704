"""`satchel list`: every method, by the slot that it fills."""

import json
from typing import Annotated

import typer

from satchel.cli.console import out, table
from satchel.core import book
from satchel.core.errors import UnknownName


def list_methods(
    slot: Annotated[str, typer.Argument(help="Only this slot, such as adapter.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, by the slot of a job that they fill."""
    if slot and slot not in book.slots():
        raise UnknownName("slot", slot, book.slots())
    found = [entry for entry in book.entries() if slot in ("", entry.slot)]
    if as_json:
        rows = [{"slot": e.slot, "name": e.name, "fidelity": e.card.fidelity, "summary": e.summary} for e in found]
        print(json.dumps(rows, indent=1))
        return
    rows = table("slot", "name", "result", "saves", "spends", "what it does")
    for entry in found:
        card = entry.card
        rows.add_row(entry.slot, entry.name, card.fidelity, " ".join(card.saves), " ".join(card.spends), entry.summary)
    out.print(rows)
