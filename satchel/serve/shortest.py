"""Whoever needs the fewest more tokens first; waiting counts for some.

    rank = remaining - aging * seconds since arrival,   remaining = tokens not yet seen + max_tokens - tokens said

The mean time to an answer is the least that an order can give where `max_tokens` is honest: an answer that ends early
was ranked too low. Without `aging` a long request may wait for ever.
Paper: https://doi.org/10.1287/opre.16.3.687
"""

from dataclasses import dataclass

from satchel.core.card import Card
from satchel.core.serve_seams import Admission, Ticket


@dataclass(frozen=True, kw_only=True)
class Shortest(Admission):
    """See the file's docstring."""

    card = Card(paper="https://doi.org/10.1287/opre.16.3.687")

    aging: float = 10.0  # tokens that each second of waiting is worth, [0, inf)

    def __post_init__(self) -> None:
        self.require(0 <= self.aging < float("inf"), f"aging={self.aging} is outside [0, inf); 10 is usual")

    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """Remaining tokens less what the wait is worth."""
        return (ticket.remaining - self.aging * (now_s - ticket.arrival_s),)
