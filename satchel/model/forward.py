"""The model's pass over the tokens of one step, and logits where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from satchel.core.serve_seams import Draft, Feed, Skipper
from satchel.model.decoder import Decoder
from satchel.model.paged import Pages, Row, Stretch
from satchel.model.tiles import TiledLinear

# N tokens of a step, R rows of them, D width, V vocabulary

Thing = TypeVar("Thing")
HEAD_ROWS = 64  # tokens whose logits exist at once: a vocabulary of 150k in float32 is 37 MiB


@dataclass(frozen=True)
class Part:
    """What one sequence runs in a step: tokens that are certain, then guesses."""

    tokens: Sequence[int]
    draft: Draft
    table: Sequence[int]  # its blocks
    past: int  # tokens that these hold already
    first: int  # row of its first token in the step
    said: int = -1  # tokens of the answer before its first token; below 0: tokens of the prompt from there on

    @property
    def fed(self) -> int:
        """Tokens in all."""
        return len(self.tokens) + len(self.draft)

    @property
    def all_rows(self) -> range:
        """The rows of all its tokens."""
        return range(self.first, self.first + self.fed)

    @property
    def rows(self) -> range:
        """The rows of its last certain token and its guesses, which say what comes next."""
        return range(self.first + len(self.tokens) - 1, self.first + self.fed)


@torch.inference_mode()
def hidden(model: Decoder, pages: Pages, parts: Sequence[Part], skipper: Skipper | None = None) -> Tensor:
    """The state [N, D] before the head of every token of the step; keys and values go into its pages."""
    stretches = [Stretch(part.table, part.past, part.fed, part.draft.parents) for part in parts]
    row = Row(pages, stretches, padded(sum(part.fed for part in parts)))
    feed = skipper.over(_said(parts, row)) if skipper else None
    return states(model, row, [token for part in parts for token in (*part.tokens, *part.draft.tokens)], feed)


@torch.inference_mode()
def states(model: Decoder, row: Row, tokens: Sequence[int], feed: Feed | None = None) -> Tensor:
    """The state [N, D] before the head of every token of a row, and of its filler."""
    tokens_1N = torch.tensor([[*tokens, *[0] * row.filler]], device=row.position_N.device)
    return model.hidden(tokens_1N, cache=row, feed=feed)[0]


def _said(parts: Sequence[Part], row: Row) -> Tensor:
    """For every token of the row, those of its answer that come before it; -1 where it is filler."""
    said = [row.position_N[part.all_rows.start : part.all_rows.stop] + (part.said - part.past) for part in parts]
    return torch.cat([*said, row.position_N.new_full((row.filler,), -1)])


@torch.inference_mode()
def logits(model: Decoder, x_RD: Tensor) -> Tensor:
    """Logits in float32, [R, V]; those of a head in tiles are never rounded to less."""
    rows = len(x_RD)
    x_RD = x_RD.float() if isinstance(model.lm_head, TiledLinear) else x_RD
    if filler := padded(rows) - rows:
        x_RD = torch.cat([x_RD, x_RD[-1:].expand(filler, -1)])
    return model.logits(x_RD[None])[0, :rows].float()


def chosen(x_ND: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, by number; no copy where they follow one another."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows) and all(a < b for a, b in pairwise(rows)):
        return x_ND[first : last + 1]
    return x_ND[list(rows)]


def groups(things: Sequence[Thing], rows: Callable[[Thing], int]) -> Iterator[list[Thing]]:
    """Things whose wanted rows are HEAD_ROWS together, or those of one if these are more."""
    group: list[Thing] = []
    for thing in things:
        if group and sum(map(rows, (*group, thing))) > HEAD_ROWS:
            yield group
            group = []
        group.append(thing)
    if group:
        yield group


def padded(rows: int) -> int:
    """The next larger number of rows that steps have, four to an octave: every new one costs a CPU time and memory for
    kernels of its own."""
    step = max(1, 1 << max(rows.bit_length() - 3, 0))
    return -(-rows // step) * step
