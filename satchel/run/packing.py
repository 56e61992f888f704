"""Laying documents into rows of at most `context` tokens, and rows into the batches of each step.

Documents longer than a row are split into pieces of `context` tokens. With packing, pieces are laid best-fit, longest
first; without, a row is one piece; `fill` lays documents end to end and cuts wherever a row is full. No token attends
across documents (`Batch.lengths`), so that packing changes no loss.

Rows form an endless stream, shuffled anew each epoch; step s takes rows [s * batch, (s + 1) * batch) of it. What a step
sees is thus a pure function of the seed and the step, and resuming needs no more than the step.

Shapes: N tokens of all documents, P pieces, R rows.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from satchel.model.batch import IGNORE, Batch
from satchel.run.balance import deal

if TYPE_CHECKING:
    from satchel.run.data import Corpus

Places = Sequence[int] | np.ndarray  # numbers of rows


class Piece(NamedTuple):
    """A stretch of one document: it feeds tokens[start : start + length], and each predicts the one behind it."""

    corpus: Corpus
    start: int
    length: int


class Stream(ABC):
    """Rows, by number, and which of them each step sees."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows of one epoch."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that one epoch feeds."""

    @abstractmethod
    def pieces(self, row: int) -> list[Piece]:
        """What a row is made of."""

    @abstractmethod
    def step_rows(self, step: int, batch: int, seed: int, total: int) -> np.ndarray:
        """Which rows step `step` (from 0) sees, of a stream of `total` rows; the last step may see fewer."""

    @abstractmethod
    def fullest(self) -> tuple[int, ...]:
        """The lengths of the documents in the row with the most tokens, of these the one with the most documents."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of all tokens and of how they lie in rows."""

    @abstractmethod
    def domains(self) -> Mapping[str, Rows]:
        """The rows of each source, by its name; '' where there is one without a name."""

    def length(self, batch: int, steps: int, epochs: float) -> tuple[int, int]:
        """Optimizer steps, and rows that all of them see: `steps` whole batches, or what `epochs` hold if it is 0."""
        if steps:
            return steps, steps * batch
        rows = math.ceil(round(epochs * self.epoch_rows(batch), 6))
        return math.ceil(rows / batch), rows

    def epoch_rows(self, batch: int) -> float:
        """Rows of one epoch, in steps of `batch`."""
        return len(self)

    def batches(self, rows: Places, micro_batch: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """What rank `rank` of `ranks` runs of the given rows: batches of at most `micro_batch` rows, of even length."""
        tokens_R = np.array([sum(piece.length for piece in self.pieces(int(row))) for row in rows], dtype=np.int64)
        mine = deal(tokens_R, ranks)[rank]
        parts = deal(tokens_R[mine], -(-len(mine) // micro_batch)) if len(mine) else []
        return [self.batch(np.asarray(rows)[mine[part]]) for part in parts]

    def batch(self, rows: Places) -> Batch:
        """The given rows, laid end to end."""
        return lay(piece for row in rows for piece in self.pieces(int(row)))


@dataclass(frozen=True)
class Rows(Stream):
    """Rows of pieces of one corpus."""

    corpus: Corpus
    starts_P: np.ndarray  # int64: where each piece begins
    lengths_P: np.ndarray  # int64: tokens that it feeds
    bounds_R1: np.ndarray  # int64: row r is pieces[bounds[r] : bounds[r + 1]]

    def __len__(self) -> int:
        return len(self.bounds_R1) - 1

    @property
    def tokens(self) -> int:
        """See `Stream`."""
        return int(self.lengths_P.sum())

    @property
    def tokens_R(self) -> np.ndarray:
        """Tokens that each row feeds."""
        ends = np.concatenate([[0], np.cumsum(self.lengths_P)])[self.bounds_R1]
        return np.diff(ends)

    def pieces(self, row: int) -> list[Piece]:
        """See `Stream`."""
        places = range(self.bounds_R1[row], self.bounds_R1[row + 1])
        return [Piece(self.corpus, int(self.starts_P[p]), int(self.lengths_P[p])) for p in places]

    def step_rows(self, step: int, batch: int, seed: int, total: int) -> np.ndarray:
        """See `Stream`."""
        return self.drawn(step * batch, min((step + 1) * batch, total), seed)

    def drawn(self, first: int, end: int, seed: int) -> np.ndarray:
        """Rows [first, end) of the endless stream."""
        places = np.arange(first, end)
        orders = {epoch: shuffled(len(self), seed, epoch) for epoch in np.unique(places // max(len(self), 1)).tolist()}
        return np.array([orders[place // len(self)][place % len(self)] for place in places.tolist()], dtype=np.int64)

    def in_order(self, micro_batch: int) -> Iterator[Batch]:
        """Every row once, so many at a time."""
        for first in range(0, len(self), micro_batch):
            yield self.batch(range(first, min(first + micro_batch, len(self))))

    def fed(self, rows: int, seed: int) -> int:
        """Tokens in the first `rows` rows of the endless stream."""
        epochs, rest = divmod(rows, max(len(self), 1))
        return epochs * self.tokens + int(self.tokens_R[shuffled(len(self), seed, epochs)[:rest]].sum())

    def fullest(self) -> tuple[int, ...]:
        """See `Stream`."""
        row = int(np.lexsort((np.diff(self.bounds_R1), self.tokens_R))[-1])
        return tuple(piece.length for piece in self.pieces(row))

    def sample(self, count: int, seed: int) -> Rows:
        """`count` of the rows, drawn at random, in their order: packing puts the longest documents first."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        pieces = [np.arange(int(self.bounds_R1[row]), int(self.bounds_R1[row + 1])) for row in rows]
        order = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
        bounds = np.concatenate([[0], np.cumsum([len(each) for each in pieces])]).astype(np.int64)
        return Rows(self.corpus, self.starts_P[order], self.lengths_P[order], bounds)

    def digest(self) -> str:
        """See `Stream`."""
        digest = hashlib.blake2b(self.corpus.digest().encode(), digest_size=16)
        for values in (self.starts_P, self.lengths_P, self.bounds_R1):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def domains(self) -> Mapping[str, Rows]:
        """See `Stream`."""
        return {"": self}


@lru_cache(maxsize=16)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def lay(pieces: Iterable[Piece]) -> Batch:
    """Pieces as one row of documents."""
    pieces = list(pieces)
    spans = [corpus.tokens_N[start : start + length + 1] for corpus, start, length in pieces]
    tokens_N = np.concatenate([span[:-1] for span in spans]).astype(np.int64)
    targets_N = np.concatenate([span[1:] for span in spans]).astype(np.int64)
    learnt_N = np.concatenate([corpus.learnt_N[a + 1 : a + n + 1] for corpus, a, n in pieces])
    targets_N[~learnt_N] = IGNORE
    return Batch(
        torch.from_numpy(tokens_N)[None],
        torch.from_numpy(targets_N)[None],
        tuple(piece.length for piece in pieces),
        int(learnt_N.sum()),
    )


def pack(corpus: Corpus, documents: np.ndarray, context: int, packing: bool = True) -> Rows:
    """Rows of at most `context` tokens from the given documents of `corpus`; without `packing`, one piece a row."""
    starts, lengths = cut(corpus, documents, context)
    rows = best_fit(lengths, context) if packing else [[p] for p in range(len(lengths))]
    order = np.array([p for row in rows for p in row], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Rows(corpus, starts[order], lengths[order], bounds)


def fill(corpus: Corpus, documents: np.ndarray, context: int) -> Rows:
    """Rows of exactly `context` tokens: documents end to end in the order given, cut where a row is full.

    Only the last row may be shorter. A document's last token is only a target, so each token is fed and predicted once.
    """
    starts_M = corpus.starts_M1[documents]
    fed_M = corpus.starts_M1[documents + 1] - 1 - starts_M
    ends_M = np.cumsum(fed_M)
    total = int(fed_M.sum())
    row_starts = np.arange(0, total, context)
    cuts_P = np.union1d((ends_M - fed_M)[fed_M > 0], row_starts)  # where pieces begin, counted in tokens that are fed
    document_P = np.searchsorted(ends_M, cuts_P, side="right")
    starts_P = starts_M[document_P] + cuts_P - (ends_M - fed_M)[document_P]
    bounds_R1 = np.searchsorted(cuts_P, np.append(row_starts, total))
    return Rows(corpus, starts_P.astype(np.int64), np.diff(cuts_P, append=total).astype(np.int64), bounds_R1)


def cut(corpus: Corpus, documents: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every piece of at most `context` fed tokens; a document's last token is only a target."""
    starts, lengths = [], []
    for document in documents:
        first, end = int(corpus.starts_M1[document]), int(corpus.starts_M1[document + 1]) - 1
        for start in range(first, end, context):
            starts.append(start)
            lengths.append(min(context, end - start))
    return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)


def best_fit(lengths_P: np.ndarray, context: int) -> list[list[int]]:
    """Pieces by row, longest first, each laid into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows with exactly so many
    free: list[int] = []  # the keys of `with_room`, sorted
    for piece in np.argsort(-lengths_P, kind="stable"):
        length = int(lengths_P[piece])
        at = bisect.bisect_left(free, length)
        if at < len(free):
            room = free[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], free[at]
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(int(piece))
        left = room - length
        if left:
            if left not in with_room:
                bisect.insort(free, left)
            with_room.setdefault(left, []).append(row)
    return rows
