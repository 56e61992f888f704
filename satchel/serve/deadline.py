"""The earliest deadline first, and it may stop one whose deadline is later; requests without one come last.

    rank = (deadline, time of arrival)

If any order meets all deadlines on one machine, this one does. When there is too much work it is the worst of all: it
spends itself on what is just about to be late.
Paper: https://doi.org/10.1145/321738.321743
"""

from dataclasses import dataclass

from satchel.core.card import Card
from satchel.core.serve_seams import Admission, Ticket


@dataclass(frozen=True, kw_only=True)
class Deadline(Admission):
    """See the file's docstring."""

    card = Card(paper="https://doi.org/10.1145/321738.321743", spends=("compute",))

    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """The deadline, then the time of arrival."""
        return (ticket.deadline_s, ticket.arrival_s)

    def displaces(self, waiting: Ticket, running: Ticket) -> bool:
        """Whether the one that waits is due earlier."""
        return waiting.deadline_s < running.deadline_s
