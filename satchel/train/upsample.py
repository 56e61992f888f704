"""Domain upsampling: at the end of the run small, good sources are drawn more often than their sizes would have it.

    share_k = the job's                                          until the last `last` of the steps
              to_k / sum of to, at most cap passes in that time  from there on; what is cut off goes to the others

The learning rate decays as it did. Between 10% and 20% of the steps are best: at 30% the general loss suffers.
`without` leaves one source out of the end: the difference to the run with it is what that source is worth. A job that
branches off (`branch`) from a checkpoint where the end begins pays for the end alone.
Spends compute only where the base run is over already.
Paper: https://arxiv.org/abs/2406.03476
"""

from collections.abc import Sequence
from dataclasses import dataclass

from satchel.core.seams import Card, Domain, Mixture


@dataclass(frozen=True, kw_only=True)
class Upsample(Mixture):
    """Another mix for the last steps."""

    card = Card(
        paper="https://arxiv.org/abs/2406.03476",
        claim="+6.9 points on MMLU, +8.3 on GSM8K, +6.2 on HumanEval over the base mix, at 7B and 1T tokens",
    )

    last: float = 0.15  # share of the steps, from the end, in the other mix, [0, 1]
    to: tuple[float, ...] = ()  # weights of the sources there, spelled 1+4+4; empty: equal ones
    cap: float = 4.0  # passes over a source within these steps at most, (0, inf)
    without: int = 0  # which source, from 1, is left out there; 0: none

    def __post_init__(self) -> None:
        self.require(0 <= self.last <= 1, f"last={self.last} is outside [0, 1]; 0.1 to 0.2 is best")
        self.require(self.cap > 0, f"cap={self.cap} is not above 0; 4 passes are usual")
        self.require(all(each >= 0 for each in self.to), f"to={self.to}: a weight is not below 0")
        self.require(self.without >= 0, f"without={self.without} is no number of a source; they count from 1")

    def at(self, step: int, steps: int, domains: Sequence[Domain]) -> tuple[float, ...]:
        """The job's shares, and at the end the others."""
        first = round((1 - self.last) * steps)
        if step < first:
            return tuple(domain.share for domain in domains)
        limits = [self.cap * domain.pass_steps / (steps - first) for domain in domains]
        return capped(self._weights(domains), limits)

    def _weights(self, domains: Sequence[Domain]) -> tuple[float, ...]:
        counted = f"{len(domains)} sources"
        self.require(len(self.to) in (0, len(domains)), f"to has {len(self.to)} weights for {counted}")
        self.require(self.without <= len(domains), f"without={self.without}: there are {counted}")
        weights = self.to or (1.0,) * len(domains)
        kept = tuple(0.0 if k == self.without else weight for k, weight in enumerate(weights, 1))
        self.require(sum(kept) > 0, "no source is left to draw from; give one a weight")
        return kept


def capped(weights: Sequence[float], limits: Sequence[float]) -> tuple[float, ...]:
    """Shares in proportion to the weights, none above its limit; if all of them reach it, above it by one factor."""
    shares, left = [0.0] * len(weights), 1.0
    free = [k for k, weight in enumerate(weights) if weight > 0]
    while free:
        each = {k: left * weights[k] / sum(weights[j] for j in free) for k in free}
        over = [k for k in free if each[k] > limits[k]]
        for k in over or free:
            shares[k] = limits[k] if over else each[k]
        left -= sum(limits[k] for k in over)
        free = [k for k in free if over and k not in over]
    return tuple(share / sum(shares) for share in shares)
