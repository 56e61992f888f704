"""`satchel show NAME`: what a method does, its knobs, and its card."""

from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from satchel.cli.console import out, table
from satchel.core import book
from satchel.core.book import Entry
from satchel.core.errors import UnknownName
from satchel.core.knobs import REQUIRED


def show(name: Annotated[str, typer.Argument(help="A method, such as lora.", show_default=False)]) -> None:
    """Show what a method does, its knobs and defaults, what it saves and spends, and its paper."""
    every = book.entries()
    found = [entry for entry in every if entry.name == name]
    if not found:
        raise UnknownName("method", name, [entry.name for entry in every])
    for entry in found:
        _print(entry)


def _print(entry: Entry) -> None:
    out.print(Text.assemble((entry.name, "bold"), f"  {entry.slot}, {entry.room}/{entry.name}.py\n"))
    out.print(Text(entry.doc), soft_wrap=True)
    out.print()
    if entry.knobs:
        out.print(_knobs(entry))
        out.print(Text(f"\nSpelled --{entry.slot} {_spelling(entry)}\n"))
    out.print(Padding(_card(entry), (0, 0, 1, 0)))


def _knobs(entry: Entry):
    rows = table("knob", "type", "default", "meaning")
    for knob in entry.knobs:
        default = "required" if knob.default is REQUIRED else str(knob.default)
        rows.add_row(*map(Text, (knob.name, knob.kind, default, knob.comment)))
    return rows


def _card(entry: Entry):
    card = entry.card
    dial = f"{card.dial[0]}, from {card.dial[1]:g} to {card.dial[2]:g}" if card.dial else ""
    facts = {
        "result": {"exact": "exact: that of the plain job", "approx": "near that of the plain job"}.get(card.fidelity),
        "saves": ", ".join(card.saves),
        "spends": ", ".join(card.spends),
        "claim": card.claim,
        "dial": dial,
        "equal to": card.reference,
        "paper": card.paper,
    }
    rows = table("card", "")
    for label, fact in facts.items():
        if fact:
            rows.add_row(label, Text(fact))
    return rows


def _spelling(entry: Entry) -> str:
    """The method with its demo knobs, or its first knob, as an example."""
    first = entry.knobs[0]
    shown = entry.card.demo or {first.name: first.default}
    return f"{entry.name}:" + ",".join(f"{name}={value}" for name, value in shown.items())
