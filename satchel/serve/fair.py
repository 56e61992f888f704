"""The tenant that got the fewest tokens first, so that none starves another by sending more.

    rank = (tokens that the tenant was served, time of arrival),   answers' tokens count twice

While two tenants always have work, what they were served differs by no more than what one step and one prompt hold,
however many requests each of them sends. Within a tenant it is first come, first served. Spends the reuse of blocks
that a tenant's own order would have had.
Paper: https://arxiv.org/abs/2401.00588
"""

from dataclasses import dataclass

from satchel.core.card import Card
from satchel.core.serve_seams import Admission, Ticket


@dataclass(frozen=True, kw_only=True)
class Fair(Admission):
    """The virtual token counter of Sheng et al.: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2401.00588",
        claim="the service of two backlogged tenants differs by at most twice the tokens that a batch can hold",
    )

    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """What the tenant was served, then the time of arrival."""
        return (served, ticket.arrival_s)
