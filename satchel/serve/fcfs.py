"""First come, first served.

    rank = time of arrival

Nobody waits for ever and nobody is displaced, but one that came early and is long makes all others wait.
"""

from dataclasses import dataclass

from satchel.core.card import Card
from satchel.core.serve_seams import Admission, Ticket


@dataclass(frozen=True, kw_only=True)
class Fcfs(Admission):
    """See the file's docstring."""

    card = Card(paper="https://www.usenix.org/conference/osdi22/presentation/yu")

    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """The time of arrival."""
        return (ticket.arrival_s,)
