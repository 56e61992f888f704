"""The same shares of the sources throughout: those that the job gives, or in proportion to their sizes.

    share_k = weight_k / sum of all weights

By size every source is over at the same time, and an epoch of the run is one of each. Weights above that repeat a
source more often than the others; the run says how often before it begins.
Paper: https://arxiv.org/abs/2005.14165 (section 2.2, a mixture by quality rather than by size)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from satchel.core.seams import Card, Domain, Mixture


@dataclass(frozen=True, kw_only=True)
class Fixed(Mixture):
    """The job's own weights, at every step."""

    card = Card(paper="https://arxiv.org/abs/2005.14165")

    def at(self, step: int, steps: int, domains: Sequence[Domain]) -> tuple[float, ...]:
        """As given."""
        return tuple(domain.share for domain in domains)
