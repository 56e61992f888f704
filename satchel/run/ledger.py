"""What each tenant was served: prompt tokens once, tokens of answers twice, as a virtual token counter has them.

A tenant that comes back after a rest starts level with the least served one that is active: rest is no credit.
Paper: https://arxiv.org/abs/2401.00588
"""

from __future__ import annotations

from collections.abc import Iterable

PROMPT, ANSWER = 1.0, 2.0  # what a token costs: those of an answer need a step each


class Ledger:
    """Counts by tenant."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def served(self, tenant: str) -> float:
        """What the tenant was served so far."""
        return self.counts.get(tenant, 0.0)

    def arrive(self, tenant: str, active: Iterable[str]) -> None:
        """A request of the tenant arrives while those of `active` tenants wait or run."""
        active = set(active)
        if tenant not in active:
            level = min((self.served(other) for other in active), default=0.0)
            self.counts[tenant] = max(self.served(tenant), level)

    def charge(self, tenant: str, tokens: int, answering: bool) -> None:
        """The model sees so many tokens of the tenant."""
        self.counts[tenant] = self.served(tenant) + tokens * (ANSWER if answering else PROMPT)
