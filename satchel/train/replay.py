"""Replay: a share of every batch is old data, in the place of new data.

    share_k = (1 - share) * weight_k / sum of the new sources' weights    for the new sources
              share       * weight_k / sum of the old sources' weights    for the old ones

The old sources stand last in `data`. The run is as long as the new data alone would make it: an epoch is a pass over as
many tokens as the new sources hold. 1-5% suffice for a weak shift of the data, 25-50% for a strong one, such as
another language.
Saves what full re-training on old and new data would take; spends a share of the new tokens.
Paper: https://arxiv.org/abs/2403.08763
"""

from collections.abc import Sequence
from dataclasses import dataclass

from satchel.core.seams import Card, Domain, Mixture


@dataclass(frozen=True, kw_only=True)
class Replay(Mixture):
    """A fixed share of old data in every step."""

    card = Card(
        paper="https://arxiv.org/abs/2403.08763",
        saves=("compute",),
        claim="with re-warming as good as re-training on all data, at 405M (two shifts) and 10B parameters",
    )

    share: float = 0.05  # share of every step that is old data, [0, 1]
    old: int = 1  # how many of the sources, from the last, are old data, 1 or more

    def __post_init__(self) -> None:
        self.require(0 <= self.share <= 1, f"share={self.share} is outside [0, 1]; 0.05 is usual")
        self.require(self.old >= 1, f"old={self.old} is below 1; the last source is old")

    def at(self, step: int, steps: int, domains: Sequence[Domain]) -> tuple[float, ...]:
        """The new sources' shares, then the old ones'."""
        self._require_new(domains)
        return *_scaled(domains[: -self.old], 1 - self.share), *_scaled(domains[-self.old :], self.share)

    def epoch_steps(self, domains: Sequence[Domain]) -> float:
        """What the new sources fill."""
        self._require_new(domains)
        return super().epoch_steps(domains[: -self.old])

    def _require_new(self, domains: Sequence[Domain]) -> None:
        new = len(domains) > self.old
        self.require(new, f"old={self.old} leaves no new source among {len(domains)}; name new sources first, then old")


def _scaled(domains: Sequence[Domain], share: float) -> tuple[float, ...]:
    """The domains' shares, brought to sum up to `share`; equal ones where none has any."""
    total = sum(domain.share for domain in domains)
    return tuple(share * (domain.share / total if total else 1 / len(domains)) for domain in domains)
