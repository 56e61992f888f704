"""The error tree: everything that satchel raises on purpose, and what a command-line user sees of it.

SatchelError
├── UserError            the input was wrong: the message names the cure, exit code 2, no traceback
│   ├── UnknownName      a method, knob, key or file that does not exist; carries the nearest that does
│   ├── ModelError       a folder, file or architecture that cannot be read
│   ├── DataError        every malformed record of a data set, at once
│   ├── DoesNotFit       the job exceeds its budget; carries what would do
│   ├── NoDisk           the output cannot be written: no room, no permission
│   └── Diverged         the loss is no number any more: the learning rate or the data are at fault
└── JobError             the job failed while running: out of memory, no whole checkpoint; exit code 1
"""

import difflib
from collections.abc import Iterable


class SatchelError(Exception):
    """Base of all errors that satchel raises on purpose."""

    exit_code = 1


class UserError(SatchelError):
    """The input was wrong. The message says what was wrong, what was expected, and the way out."""

    exit_code = 2


class UnknownName(UserError):
    """A name that nothing answers to, with the nearest that would be known."""

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"{f'{where}: ' if where else ''}no {kind} '{name}'; {nearest(name, self.known)}")


class ModelError(UserError):
    """A model folder, file or architecture that cannot be read, written or matched."""


class DataError(UserError):
    """Malformed records: `problems` holds one line each, with file, line, field and cure."""

    def __init__(self, problems: list[str], shown: int = 20) -> None:
        self.problems = problems
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        super().__init__("\n".join([f"{len(problems)} problem(s) in the data:", *problems[:shown], *more]))


class DoesNotFit(UserError):
    """The job cannot be made to fit its budget; the message names the smallest budget that would do."""


class NoDisk(UserError):
    """The output cannot be written; the message says what is kept."""


class Diverged(UserError):
    """Loss or weights are no numbers any more; the message names the last good checkpoint."""


class JobError(SatchelError):
    """A job that was accepted failed while it ran; the message says what was kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'rank'?` or, with nothing near, the list of what there is."""
    known = list(known)
    match = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    if match:
        return f"did you mean '{next(k for k in known if k.lower() == match[0])}'?"
    return f"there is {', '.join(known)}" if known else "there is none"
