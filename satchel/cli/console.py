"""Where the verbs print: results on stdout, complaints on stderr."""

import contextlib
import os
import sys
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140  # columns where there is no terminal to ask


class Patient:
    """stdout or stderr, whichever object it is now. Once nobody reads it any more, what is written there is dropped.

    A closed terminal or pipe must not end a run that trains for hours.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> int:
        """Write, or drop."""
        with self._dropping():
            getattr(sys, self._name).write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with self._dropping():
            getattr(sys, self._name).flush()

    @contextlib.contextmanager
    def _dropping(self):
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, getattr(sys, self._name).fileno())  # what is still in its buffer goes there too
            os.close(nowhere)


def forgive_encodings() -> None:
    """Print `?` in place of a character that the terminal's encoding lacks, and read any bytes, rather than fail."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


out = Console(
    file=cast(IO[str], Patient("stdout")), width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False
)
err = Console(
    file=cast(IO[str], Patient("stderr")), width=None if sys.stderr.isatty() else PIPED_WIDTH, highlight=False
)


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
