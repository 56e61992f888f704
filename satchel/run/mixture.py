"""Rows of several sources in one stream: a mixture says in what shares, whole rows are dealt so that they add up.

Before step s the sources have given `allot(...)[s]` rows, which never stray from the sums of their shares by more than
the rounding to whole rows. Each source is itself an endless stream, shuffled anew each epoch, that goes on where it
stopped: its first epoch is over before its second begins, and how often each was seen is exact and known beforehand.

Shapes: S steps, K sources.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from satchel.core.seams import Domain, Mixture
from satchel.run.packing import Piece, Rows, Stream

SLACK = 1e-6  # of a row: what sums of shares may lack of a whole number


@dataclass(frozen=True)
class Mixed(Stream):
    """The rows of several sources; a row's number counts through all of them."""

    parts: Mapping[str, Rows]  # by the name of the source
    weights: tuple[float, ...] = ()  # of the sources; empty: by their tokens
    mixture: Mixture | None = None  # None: rows to evaluate, which are in no order

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def tokens(self) -> int:
        """See `Stream`."""
        return sum(part.tokens for part in self.parts.values())

    def pieces(self, row: int) -> list[Piece]:
        """See `Stream`."""
        part = bisect_right(self._firsts, row) - 1
        return list(self.parts.values())[part].pieces(row - self._firsts[part])

    def step_rows(self, step: int, batch: int, seed: int, total: int) -> np.ndarray:
        """See `Stream`."""
        given_SK = self.given(batch, total)
        if step + 1 >= len(given_SK):
            return np.zeros(0, dtype=np.int64)
        spans = zip(self._firsts, self.parts.values(), given_SK[step], given_SK[step + 1], strict=True)
        return np.concatenate([first + part.drawn(int(a), int(b), seed) for first, part, a, b in spans])

    def epoch_rows(self, batch: int) -> float:
        """As the mixture has it."""
        assert self.mixture is not None, "rows to evaluate are not dealt"
        return self.mixture.epoch_steps(self.shares(batch)) * batch

    def given(self, batch: int, total: int) -> np.ndarray:
        """How many rows each source has given before every step and after the last, [S + 1, K]."""
        assert self.mixture is not None, "rows to evaluate are not dealt"
        return allot(self.mixture, self.shares(batch), batch, total)

    def shares(self, batch: int) -> tuple[Domain, ...]:
        """The sources as a mixture sees them."""
        weights = self.weights or tuple(len(part) for part in self.parts.values())
        described = zip(self.parts.items(), weights, strict=True)
        return tuple(Domain(name, weight / sum(weights), len(part) / batch) for (name, part), weight in described)

    def fed(self, batch: int, total: int, seed: int, step: int) -> dict[str, int]:
        """Tokens that each source has fed once `step` steps are over."""
        rows = self.given(batch, total)[step]
        return {name: part.fed(int(n), seed) for (name, part), n in zip(self.parts.items(), rows, strict=True)}

    def fullest(self) -> tuple[int, ...]:
        """See `Stream`."""
        return max((part.fullest() for part in self.parts.values() if len(part)), key=lambda row: (sum(row), len(row)))

    def digest(self) -> str:
        """See `Stream`."""
        parts = [(name, part.digest()) for name, part in self.parts.items()]
        return hashlib.blake2b(repr((parts, self.weights)).encode(), digest_size=16).hexdigest()

    def domains(self) -> Mapping[str, Rows]:
        """See `Stream`."""
        return self.parts

    @property
    def _firsts(self) -> list[int]:
        """The number of each part's first row."""
        return [0, *accumulate(map(len, self.parts.values()))][:-1]


@lru_cache(maxsize=4)
def allot(mixture: Mixture, domains: tuple[Domain, ...], batch: int, total: int) -> np.ndarray:
    """Deal `total` rows in steps of `batch`: rows given by each domain before every step and after the last, [S+1, K].

    Raises UserError where the mixture cannot be made of these domains.
    """
    steps = math.ceil(total / batch)
    given_SK = np.zeros((steps + 1, len(domains)), dtype=np.int64)
    due = [0.0] * len(domains)
    for step in range(steps):
        count = min(batch, total - step * batch)
        due = [old + count * share for old, share in zip(due, mixture.at(step, steps, domains), strict=True)]
        rows = deal(due, count)
        due = [old - dealt for old, dealt in zip(due, rows, strict=True)]
        given_SK[step + 1] = rows
    return given_SK.cumsum(axis=0)


def deal(due: Sequence[float], count: int) -> list[int]:
    """`count` rows to the domains that are due: what each is due in whole rows, the rest to those furthest behind."""
    rows = [max(math.floor(each + SLACK), 0) for each in due]
    while lacking := count - sum(rows):
        behind = [each - dealt for each, dealt in zip(due, rows, strict=True)]
        if lacking > 0:
            rows[behind.index(max(behind))] += 1
        else:
            rows[behind.index(min(b for b, dealt in zip(behind, rows, strict=True) if dealt))] -= 1
    return rows
