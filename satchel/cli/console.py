"""Where the verbs print: results on stdout, complaints on stderr."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140  # columns where there is no terminal to ask

out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPED_WIDTH, highlight=False)


def complain(message: str) -> None:
    """One error, as plain text: brackets in it are no markup, and nothing wraps it."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def table(*columns: str, title: str = "", right: tuple[str, ...] = ()) -> Table:
    """A table in the house's look; the columns named in `right` are aligned to the right."""
    made = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2)
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made
