"""Laying documents into rows of at most `context` tokens, and rows into the batches of each step.

Documents longer than a row are split into pieces of `context` tokens. With packing, pieces are laid best-fit, longest
first; without, a row is one piece. No token attends across documents (`Batch.lengths`), so that both give one loss.

Rows form an endless stream, shuffled anew each epoch; step s takes rows [s * batch, (s + 1) * batch) of it. What a step
sees is thus a pure function of the seed and the step, and resuming needs no more than the step.

Shapes: N tokens of all documents, P pieces, R rows.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from satchel.model.batch import IGNORE, Batch

if TYPE_CHECKING:
    from satchel.run.data import Corpus


@dataclass(frozen=True)
class Rows:
    """Rows of pieces of one corpus."""

    corpus: Corpus
    starts_P: np.ndarray  # int64: where each piece begins; it feeds tokens[start : start + length]
    lengths_P: np.ndarray  # int64; its targets are tokens[start + 1 : start + length + 1]
    bounds_R1: np.ndarray  # int64: row r is pieces[bounds[r] : bounds[r + 1]]

    def __len__(self) -> int:
        return len(self.bounds_R1) - 1

    @property
    def tokens(self) -> int:
        """Tokens that one epoch feeds."""
        return int(self.lengths_P.sum())

    def length(self, batch: int, steps: int, epochs: float) -> tuple[int, int]:
        """Optimizer steps, and rows that all of them see: `steps` whole batches, or what `epochs` hold if it is 0."""
        if steps:
            return steps, steps * batch
        rows = math.ceil(round(epochs * len(self), 6))
        return math.ceil(rows / batch), rows

    def step_rows(self, step: int, batch: int, seed: int, total: int) -> np.ndarray:
        """Which rows step `step` (from 0) sees, of a stream of `total` rows; the last step may see fewer."""
        places = np.arange(step * batch, min((step + 1) * batch, total))
        orders = {epoch: self._order(seed, epoch) for epoch in np.unique(places // len(self)).tolist()}
        return np.array([orders[place // len(self)][place % len(self)] for place in places.tolist()], dtype=np.int64)

    def batches(self, rows: Sequence[int] | np.ndarray, micro_batch: int) -> list[Batch]:
        """The given rows as batches of at most `micro_batch` rows each."""
        return [self.batch(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)]

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows, laid end to end."""
        pieces = [p for row in rows for p in range(self.bounds_R1[row], self.bounds_R1[row + 1])]
        spans = [(int(self.starts_P[p]), int(self.lengths_P[p])) for p in pieces]
        tokens_N = np.concatenate([self.corpus.tokens_N[a : a + n] for a, n in spans]).astype(np.int64)
        targets_N = np.concatenate([self.corpus.tokens_N[a + 1 : a + n + 1] for a, n in spans]).astype(np.int64)
        learnt_N = np.concatenate([self.corpus.learnt_N[a + 1 : a + n + 1] for a, n in spans])
        targets_N[~learnt_N] = IGNORE
        return Batch(
            torch.from_numpy(tokens_N)[None],
            torch.from_numpy(targets_N)[None],
            tuple(n for _, n in spans),
            int(learnt_N.sum()),
        )

    def sample(self, count: int, seed: int) -> Rows:
        """`count` of the rows, drawn at random, in their order: packing puts the longest documents first."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        pieces = [np.arange(int(self.bounds_R1[row]), int(self.bounds_R1[row + 1])) for row in rows]
        order = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
        bounds = np.concatenate([[0], np.cumsum([len(each) for each in pieces])]).astype(np.int64)
        return Rows(self.corpus, self.starts_P[order], self.lengths_P[order], bounds)

    def digest(self) -> str:
        """A hash of all tokens and of how they lie in rows."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self.corpus.tokens_N, self.corpus.learnt_N, self.starts_P, self.lengths_P, self.bounds_R1):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def pack(corpus: Corpus, documents: np.ndarray, context: int, packing: bool = True) -> Rows:
    """Rows of at most `context` tokens from the given documents of `corpus`; without `packing`, one piece a row."""
    starts, lengths = cut(corpus, documents, context)
    rows = best_fit(lengths, context) if packing else [[p] for p in range(len(lengths))]
    order = np.array([p for row in rows for p in row], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Rows(corpus, starts[order], lengths[order], bounds)


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
