"""The highest priority first, and it may stop a lower one that runs.

    rank = (-priority, time of arrival)

A lower priority waits as long as there are higher ones: starvation is the client's choice.
"""

from dataclasses import dataclass

from satchel.core.card import Card
from satchel.core.serve_seams import Admission, Ticket


@dataclass(frozen=True, kw_only=True)
class Priority(Admission):
    """See the file's docstring."""

    card = Card(paper="https://www.usenix.org/conference/osdi22/presentation/yu", spends=("compute",))

    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """Priority, then the time of arrival."""
        return (-ticket.priority, ticket.arrival_s)

    def displaces(self, waiting: Ticket, running: Ticket) -> bool:
        """Whether the one that waits has the higher priority; what the other one forgets is computed again."""
        return waiting.priority > running.priority
