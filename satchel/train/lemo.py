"""Let the tokens that attention hardly looks at pass a block by.

    y[n] = block(x)[n] for the share `keep` of each document's tokens, y[n] = x[n] for the others

Tokens are judged in groups, by the attention that they receive from all queries together. The kept ones attend among
themselves, at their positions; of the others a block keeps nothing for the backward pass and computes nothing. First
and last block run on all tokens, and so does evaluation.

Whom attention looks at is known only after it has looked, so a predictor of low rank stands before each block. It
learns in the first `learn` forward passes from a few queries of the block itself, which are run without gradients
before the block; in these passes what the queries saw decides. Nothing is run on all tokens for its sake but a norm and
the keys, and no pass is spent on it. Its state is a part of checkpoints.

Saves activations and compute in proportion to 1 - keep; spends quality. Limits: the paper drops tokens until a share of
attention is lost, so that memory depends on the data; here the share of tokens is fixed, and a job's memory is known
before it runs. A sliding window counts kept tokens. A pass that ran out of memory and is tried again teaches twice.
Paper: https://arxiv.org/abs/2501.09767
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from satchel.core.seams import Activations, Card, Run
from satchel.model.attention import Place
from satchel.model.block import Block
from satchel.train._predictor import Predictor, group_sum, pool

# N tokens of a row of documents, M of them kept, n tokens of one document, G groups, S queries, D width, H heads


@dataclass(frozen=True, kw_only=True)
class Lemo(Activations):
    """LeMo of Wang et al.: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2501.09767",
        saves=("activations", "compute"),
        spends=("quality",),
        fidelity="approx",
        claim="up to 1.93x less memory and 1.36x the speed of other fine-tuning systems",
        dial=("keep", 0.25, 1.0),
        demo={"group": 4},
    )

    keep: float = 0.5  # share of each document's tokens that a block runs on, (0, 1]
    group: int = 64  # tokens that are judged together, [1, inf)
    rank: int = 16  # features of a predictor's queries and keys, [1, inf)
    learn: int = 32  # forward passes from which the predictors learn, [0, inf)
    queries: int = 64  # of each document, that are looked at in these passes, [1, inf)

    def __post_init__(self) -> None:
        self.require(0 < self.keep <= 1, f"keep={self.keep} is outside (0, 1]; 0.5 lets half of the tokens pass")
        for name, least in (("group", 1), ("rank", 1), ("learn", 0), ("queries", 1)):
            value = getattr(self, name)
            self.require(value >= least, f"{name}={value} is below {least}; the default suits most jobs")

    def wrap(self, block: Run, index: int, depth: int) -> Run:
        """The block itself if all tokens are to pass through it."""
        if self.keep == 1 or index in (0, depth - 1):
            return block
        assert isinstance(block, Block), "tokens are judged by the attention of a decoder's block"
        return Eliminating(self, block, index)

    def kept(self, tokens: int) -> int:
        """How many tokens of a document pass through a block."""
        return math.ceil(self.keep * tokens)


class Eliminating(nn.Module):
    """A block that runs on some of its tokens. Of its tensors only the predictor's are its own."""

    block: Block

    def __init__(self, method: Lemo, block: Block, index: int) -> None:
        super().__init__()
        self.method = method
        self.__dict__["block"] = block  # whose parameters stay the decoder's
        self.predictor = Predictor(block.width, method.rank, index, next(block.parameters()).device)

    def forward(self, x_BTD: Tensor, place: Place) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x_1ND = x_BTD.flatten(0, 1)[None]
        row = _row(place, *x_BTD.shape[:2])
        with torch.no_grad():
            kept_M = self.choose(x_1ND, row)
        lengths = tuple(map(self.method.kept, row.lengths or ()))
        y_1MD = self.block(x_1ND.index_select(1, kept_M), Place(_tables(row, kept_M), lengths))
        return _Placed.apply(x_1ND, y_1MD, kept_M).view(x_BTD.shape)

    def choose(self, x_1ND: Tensor, row: Place) -> Tensor:
        """The kept tokens of all documents, in their order. The predictor learns from it while it has to."""
        learning = isinstance(self.predictor.seen, FakeTensor) or int(self.predictor.seen) < self.method.learn
        judge = self._taught if learning else self._predicted
        return self._best([judge(x_nD, part) for x_nD, part in _documents(x_1ND, row)], row)

    def recall(self, x_BTD: Tensor, place: Place) -> float:
        """The share of the tokens to keep, as all the queries of this input would have it, that the predictor finds."""
        x_1ND, row = x_BTD.flatten(0, 1)[None], _row(place, *x_BTD.shape[:2])
        with torch.no_grad():
            documents = list(_documents(x_1ND, row))
            truth = self._best([self._observed(x_nD, part, len(x_nD))[1] for x_nD, part in documents], row)
            guess = self._best([self._predicted(x_nD, part) for x_nD, part in documents], row)
        return len(set(truth.tolist()) & set(guess.tolist())) / len(truth)

    def _best(self, scores: list[Tensor], row: Place) -> Tensor:
        kept, start = [], 0
        for score_G, length in zip(scores, row.lengths or (), strict=True):
            score_n = score_G.repeat_interleave(self.method.group)[:length]
            best = score_n.sort(descending=True, stable=True).indices[: self.method.kept(length)]
            kept.append(best.sort().values + start)
            start += length
        return torch.cat(kept)

    def _predicted(self, x_nD: Tensor, part: Place) -> Tensor:
        return received(self.predictor(pool(x_nD, self.method.group)), len(x_nD), self.method.group)

    def _taught(self, x_nD: Tensor, part: Place) -> Tensor:
        shares_SG, score_G, query_S = self._observed(x_nD, part, self.method.queries)
        self.predictor.learn(pool(x_nD, self.method.group), query_S // self.method.group, shares_SG)
        return score_G

    def _observed(self, x_nD: Tensor, part: Place, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """What evenly spaced queries see: their shares by group [S, G], the groups' scores [G], which they are [S]."""
        length, group = len(x_nD), self.method.group
        query_S = torch.arange(1, min(queries, length) + 1, device=x_nD.device) * length // min(queries, length) - 1
        shares_Sn = self.block.shares(x_nD[None], query_S, part)
        shares_SG = group_sum(shares_Sn.T, group).T
        return shares_SG, received(shares_SG, length, group), query_S


def received(shares_SG: Tensor, tokens: int, group: int) -> Tensor:
    """The attention that a token of each group receives from all queries together, [G]."""
    sizes_G = (tokens - torch.arange(shares_SG.shape[1], device=shares_SG.device) * group).clamp(max=group)
    return shares_SG.sum(0) / sizes_G


class _Placed(Function):
    """The tokens that passed the block by, and those that went through it, in their places."""

    @staticmethod
    def forward(ctx: Any, x_1ND: Tensor, y_1MD: Tensor, kept_M: Tensor) -> Tensor:
        ctx.save_for_backward(kept_M)
        return x_1ND.index_copy(1, kept_M, y_1MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1ND: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept_M,) = ctx.saved_tensors
        return grad_1ND.index_fill(1, kept_M, 0), grad_1ND.index_select(1, kept_M), None


def _row(place: Place, rows: int, tokens: int) -> Place:
    """The same place for all rows of a plain batch laid end to end."""
    if place.lengths is not None:
        return place
    tables = {rope: (cos.repeat(rows, 1), sin.repeat(rows, 1)) for rope, (cos, sin) in place.tables.items()}
    return Place(tables, (tokens,) * rows)


def _tables(place: Place, index: Tensor | slice) -> dict:
    return {rope: (cos[index], sin[index]) for rope, (cos, sin) in place.tables.items()}


def _documents(x_1ND: Tensor, row: Place) -> Iterator[tuple[Tensor, Place]]:
    """Each document's tokens and place."""
    start = 0
    for length in row.lengths or ():
        part = slice(start, start + length)
        yield x_1ND[0, part], Place(_tables(row, part))
        start += length
