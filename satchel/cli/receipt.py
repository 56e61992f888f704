"""How a receipt looks in a terminal: what was predicted beside what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from satchel.cli.console import out, table
from satchel.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from satchel.run.receipt import Receipt

FORMATS = {"bytes": format_bytes, "seconds": format_seconds}


def print_receipt(receipt: Receipt) -> None:
    """Predictions beside measurements, losses, what the job left behind, and what the user should know."""
    budget = f", budget {format_bytes(receipt.budget_bytes)}" if receipt.budget_bytes else ""
    out.print("", Text(f"Receipt: {receipt.device}{budget}\n", "bold"), _lines(receipt), "", _facts(receipt), sep="\n")
    for note in receipt.notes:
        out.print(Text(note, "dim"))


def _lines(receipt: Receipt) -> Table:
    rows = table("", "predicted", "measured", "error", right=("predicted", "measured", "error"))
    for line in receipt.lines:
        show = FORMATS.get(line.unit, "{:g}".format)
        measured = "-" if line.measured is None else show(line.measured)
        rows.add_row(line.name, show(line.predicted), measured, "" if line.error is None else f"{line.error:+.1%}")
    return rows


def _facts(receipt: Receipt) -> Table:
    rows = table("", "")
    for name, loss in receipt.losses.items():
        rows.add_row(f"loss, {name.replace('_', ' ')}", f"{loss:.4f}")
    rate = f", {receipt.tokens / receipt.seconds:,.0f} a second" if receipt.seconds else ""
    rows.add_row("tokens", f"{receipt.tokens:,} in {format_seconds(receipt.seconds)}{rate}")
    for kind, path in receipt.outputs.items():
        rows.add_row(kind, Text(path))
    return rows
