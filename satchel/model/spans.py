"""Attention over pages in plain torch, without a number that has to come to the host: for GPUs, and CPUs without C++.

    row = Spans(pages, shape, laid(shape, tiles, ...));   out_1NHE = row.layers[0].attend(q_1NHE, k_1NKE, v_1NKE, ...)

The rows of a step are cut into tiles of one sequence each: of answers, all new tokens, of prompts some dozens. Tiles
side by side go through their tables some pages at a time, and keep what a softmax needs to go on: the highest score,
the sum, the weighted values. Tiles with long tables come first, so that those that are through leave at the end. How
many tiles, rows and pages there are is a `Shape`, known before the step; everything else is numbers in one tensor, so
that a recorded step can be run again on others (run/graphs.py). Keys, values and scores of BUDGET numbers are alive at
once, whatever the context. Sums are in one order: the same numbers give the same bits.

torch's own operators do not take these pages: `varlen_attn` knows neither trees nor soft caps, nor pages of 16 tokens,
and `flex_attention` wants a pool in which slots lie one stride apart, and a compiler for every shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from satchel.model.functional import wide
from satchel.native.paged import PAGE

if TYPE_CHECKING:
    from satchel.model.paged import Pages, Stretch

# N tokens of the row, A tiles of R rows and L pages, S slots looked at together, H query heads, K kv heads,
# G = H / K, M = G * R, E head dim, P = PAGE

FEW = 8  # new tokens of a sequence up to which they are one tile, beside tiles like it
TILE = 64  # rows of a tile else
BUDGET = 2**24  # numbers of keys and values, or of scores, that are alive at once: 64 MiB in float32
BITS = 63  # of a branch
LOWEST = -1e30  # below every score; finite, so that what sees nothing yet is 0 and not undefined
NOWHERE = 2**40  # position of a row that is none: it sees nothing


@dataclass(frozen=True)
class Tile:
    """Rows [first, stop) of one sequence."""

    first: int
    stop: int
    end: int  # slots of the sequence that they may look at
    table: Sequence[int]

    @property
    def pages(self) -> int:
        """That hold these slots."""
        return -(-self.end // PAGE)


@dataclass(frozen=True)
class Group:
    """Tiles side by side."""

    rows: int  # of each, at most
    pages: tuple[int, ...]  # of each, falling

    @property
    def sizes(self) -> list[int]:
        """Of its parts among the numbers: rows, ends, pages."""
        tiles = len(self.pages)
        return [tiles * self.rows, tiles, tiles * self.pages[0]]


@dataclass(frozen=True)
class Shape:
    """All that the operators of a step depend on beside numbers."""

    rows: int
    groups: tuple[Group, ...]

    @property
    def sizes(self) -> list[int]:
        """Of all parts: slots, rows they are from, sight; then those of the groups."""
        return [self.rows, self.rows, 3 * self.rows, *(size for group in self.groups for size in group.sizes)]


def cut(stretches: Sequence[Stretch]) -> list[list[Tile]]:
    """The tiles of a row, those of few rows apart from those of many; the longest tables first."""
    few: list[Tile] = []
    many: list[Tile] = []
    first = 0
    for s in stretches:
        size, group = (s.tokens, few) if s.tokens <= FEW else (TILE, many)
        for at in range(0, s.tokens, size or 1):
            stop = min(at + size, s.tokens)
            group.append(Tile(first + at, first + stop, s.past + stop, s.table))
        first += s.tokens
    return [sorted(tiles, key=lambda tile: -tile.pages) for tiles in (few, many) if tiles]


def fitting(tiles: Sequence[Sequence[Tile]], rows: int) -> Shape:
    """The shape of a row, no larger than it must be."""
    groups = (Group(max(t.stop - t.first for t in some), tuple(t.pages for t in some)) for some in tiles)
    return Shape(rows, tuple(groups))


def laid(
    shape: Shape, tiles: Sequence[Sequence[Tile]], stretches: Sequence[Stretch], sight_3N: Sequence[Sequence[int]]
) -> np.ndarray:
    """The numbers of a row in a shape that has room for it. A row beyond the stretches' is filler: it stores what the
    first one stores, in the same slot, and nobody looks for it."""
    flat = np.zeros(sum(shape.sizes), dtype=np.int64)
    slot_N, source_N, sight, *rest = np.split(flat, list(accumulate(shape.sizes))[:-1])
    count = len(sight_3N[0])
    slot_N[:count], source_N[:count] = _slots(stretches), np.arange(count)
    slot_N[count:] = slot_N[0]
    sight.reshape(3, -1)[:, :count] = sight_3N
    for number, (group, some) in enumerate(zip(shape.groups, tiles, strict=True)):
        row_AR, end_A, page_AL = rest[3 * number : 3 * number + 3]
        row_AR[:] = shape.rows
        end_A[: len(some)] = [tile.end for tile in some]
        wide_AR, wide_AL = row_AR.reshape(-1, group.rows), page_AL.reshape(-1, group.pages[0])
        for tile, row_R, page_L in zip(some, wide_AR, wide_AL, strict=False):
            row_R[: tile.stop - tile.first] = range(tile.first, tile.stop)
            page_L[: tile.pages] = tile.table[: tile.pages]
    return flat


def _slots(stretches: Sequence[Stretch]) -> np.ndarray:
    """Where keys and values of each token go, counted over all blocks of the pool."""
    slots = []
    for s in stretches:
        at = np.arange(s.past, s.past + s.tokens)
        first = s.past // PAGE
        table = np.array(s.table[first : -(-(s.past + s.tokens) // PAGE)], dtype=np.int64)
        slots.append(table[at // PAGE - first] * PAGE + at % PAGE)
    return np.concatenate(slots)


class Tiles:
    """A group's numbers on the pool's device."""

    def __init__(self, group: Group, rows: int, row_AR: Tensor, end_A: Tensor, page_AL: Tensor) -> None:
        self.group, self.end_A = group, end_A
        self.row_AR, self.page_AL = row_AR.view(-1, group.rows), page_AL.view(len(end_A), -1)
        self.read_AR = self.row_AR.clamp(max=rows - 1)  # a row that is none reads any, and is written to nobody's

    def steps(self, window: int, numbers: int) -> Iterator[tuple[slice, slice]]:
        """Tiles and pages to look at together, pages counted from the first that a tile may see. `numbers`: of a page
        and a tile, that are alive meanwhile."""
        most = -(-(window + self.group.rows + BITS) // PAGE) + 1 if window else self.group.pages[0]
        pages = [min(count, most) for count in self.group.pages]
        begin, active = 0, len(pages)
        while begin < pages[0]:
            stop = min(begin + max(BUDGET // (active * numbers), 1), pages[0])
            yield slice(active), slice(begin, stop)
            begin = stop
            active = sum(count > begin for count in pages)

    def known(self, sight_3N: Tensor, window: int) -> Tensor:
        """Of each row, [4, A, 1, 1, R]: what it sees, and the first slot of the first page that its tile may see."""
        limit_AR, branch_AR, position_AR = sight_3N[:, self.row_AR]
        oldest_A = (position_AR.amin(1) - (window - 1)).clamp(min=0) if window else torch.zeros_like(self.end_A)
        first_AR = (oldest_A // PAGE * PAGE)[:, None].expand_as(limit_AR)
        return torch.stack([limit_AR, branch_AR, position_AR, first_AR])[:, :, None, None]

    def look(self, some: slice, first_A: Tensor, span: slice) -> Tensor:
        """The pool's pages in a span of tables, [A, L]."""
        page_AL = self.page_AL[some]
        at_AL = first_A[some, None] // PAGE + torch.arange(span.start, span.stop, device=first_A.device)
        return page_AL.gather(1, at_AL.clamp(max=page_AL.shape[1] - 1))


class Spans:
    """A row over pages: what `Decoder.hidden` takes as its cache."""

    def __init__(self, pages: Pages, shape: Shape, flat: Tensor) -> None:
        """`flat`: what `laid` says, on the pool's device."""
        self.pages, self.shape, self.flat = pages, shape, flat
        self.slot_N, self.source_N, sight, *_ = flat.split(shape.sizes)
        self.sight_3N = sight.view(3, -1)
        self._known: dict[int, list[Tensor]] = {}
        self.layers = [SpanLayer(self, index) for index in range(pages.data.shape[1])]  # the row as each layer sees it

    @cached_property
    def tiles(self) -> list[Tiles]:
        """Of all groups."""
        parts = self.flat.split(self.shape.sizes)[3:]
        groups = enumerate(self.shape.groups)
        return [Tiles(group, self.shape.rows, *parts[3 * number : 3 * number + 3]) for number, group in groups]

    def positions(self, tokens_BT: Tensor) -> tuple[Tensor, int]:
        """The tokens' positions, and the longest sequence that there may be."""
        return self.sight_3N[2], self.pages.context

    def known(self, window: int) -> list[Tensor]:
        """Of each group, what `Tiles.known` says: the same for all layers of a window."""
        if window not in self._known:
            limit_N, branch_N, position_N = self.sight_3N
            nothing_31 = torch.zeros_like(self.sight_3N[:, :1])
            nothing_31[2] = NOWHERE
            some = torch.stack([limit_N, _latest(branch_N, window) if window else branch_N, position_N])
            sight_3N = torch.cat([some, nothing_31], 1)  # the last row is none, which sees nothing
            self._known[window] = [tiles.known(sight_3N, window) for tiles in self.tiles]
        return self._known[window]


class SpanLayer:
    """One layer of a row."""

    def __init__(self, row: Spans, index: int) -> None:
        self.row, self.index = row, index

    def attend(
        self,
        q_1NHE: Tensor,
        k_1NKE: Tensor,
        v_1NKE: Tensor,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> Tensor:
        """Stores keys and values of the new tokens, and attends from these: [1, N, H, E]; zero for filler."""
        row, q_NHE = self.row, q_1NHE[0]
        row.pages.store(self.index, row.slot_N, k_1NKE[0, row.source_N], v_1NKE[0, row.source_N])
        out_NHE = q_NHE.new_zeros(len(q_NHE) + 1, *q_NHE.shape[1:])
        for tiles, known_4A11R in zip(row.tiles, row.known(window or 0), strict=True):
            how = scale, window or 0, cap or 0.0
            out_NHE[tiles.row_AR] = self._found(q_NHE[tiles.read_AR], tiles, known_4A11R, *how)
        return out_NHE[None, :-1]

    def _found(
        self, q_ARHE: Tensor, tiles: Tiles, known_4A11R: Tensor, scale: float, window: int, cap: float
    ) -> Tensor:
        """What the tiles' rows find, [A, R, H, E]."""
        pages, rows, heads = self.row.pages, *q_ARHE.shape[1:3]
        q_AKGRE = q_ARHE.unflatten(2, (pages.heads, -1)).permute(0, 2, 3, 1, 4)
        q_AKME, first_A = q_AKGRE.flatten(2, 3), known_4A11R[3, :, 0, 0, 0]
        total_AKGRE = torch.zeros_like(q_AKGRE, dtype=wide(q_ARHE.dtype), memory_format=torch.contiguous_format)
        best_AKGR = torch.full_like(total_AKGRE[..., 0], LOWEST, memory_format=torch.contiguous_format)
        share_AKGR = torch.zeros_like(best_AKGR)
        for some, span in tiles.steps(window, PAGE * max(2 * pages.heads * pages.dim, heads * rows)):
            k_AKES, v_AKSE = pages.read(self.index, tiles.look(some, first_A, span))
            slot_S = torch.arange(span.start * PAGE, span.stop * PAGE, device=first_A.device)
            nobodys_AS = first_A[some, None] + slot_S >= tiles.end_A[some, None]
            v_AKSE.masked_fill_(nobodys_AS[:, None, :, None], 0)  # memory that nobody wrote
            score_AKGRS = (q_AKME[some] @ k_AKES).unflatten(2, (-1, rows))
            state = best_AKGR[some], share_AKGR[some], total_AKGRE[some]
            share_AKGRS = pages.weighed(score_AKGRS, known_4A11R[:, some], slot_S, *state, scale, window, cap)
            total_AKGRE[some].flatten(2, 3).add_(share_AKGRS.flatten(2, 3) @ v_AKSE)
        mean_AKGRE = total_AKGRE / share_AKGR[..., None]
        return mean_AKGRE.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q_ARHE.dtype)


def weighed(
    score: Tensor,
    known_4: Tensor,
    slot_S: Tensor,
    best: Tensor,
    share: Tensor,
    total: Tensor,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    """A softmax under way goes on to slots more: what their values are to be multiplied by, [..., S], of their scores,
    which are overwritten. It keeps the highest score and the sum, [...], and brings the weighted values [..., E] to the
    new highest; they are not a number for a row that saw nothing. `known_4`, [4, ...]: see `Tiles.known`."""
    wide_score = score.to(best.dtype).mul_(scale)
    if cap:
        wide_score.div_(cap).tanh_().mul_(cap)
    slot = known_4[3, ..., None] + slot_S
    wide_score.masked_fill_(~seen(known_4[:3, ..., None], slot, window), -torch.inf)
    top = torch.maximum(best, wide_score.amax(-1))
    fade, new = (best - top).exp_(), wide_score.sub_(top[..., None]).exp_()
    share.mul_(fade).add_(new.sum(-1))
    total.mul_(fade[..., None])
    best.copy_(top)
    return new.to(score.dtype)


def seen(sight_3: Tensor, slot: Tensor, window: int) -> Tensor:
    """Whether a row looks at a slot; the shapes are those of sight and slots, broadcast."""
    limit, branch, position = sight_3
    bit = slot - limit
    stem = (bit < 0) & (slot > position - window) if window else bit < 0
    return stem | (bit >= 0) & (bit < BITS) & ((branch >> bit.clamp(0, BITS - 1)) & 1).bool()


def _latest(branch_N: Tensor, window: int) -> Tensor:
    """The highest bits: a branch's slots rise with its positions, so that a window forgets the lowest first."""
    bit_J = torch.arange(BITS, device=branch_N.device)
    branch_NJ = (branch_N[:, None] >> bit_J) & 1
    kept_NJ = branch_NJ * (branch_NJ.flip(1).cumsum(1).flip(1) <= window)
    return (kept_NJ << bit_J).sum(1)
