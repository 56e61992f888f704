"""Fixed addresses for tensors whose coming and going is known: the least memory that one block of it can be.

A rehearsal knows when each tensor is made and dropped. Level 1 lays the tensors that live within one layer's forward or
backward pass into the smallest block; level 2 takes each layer for one request of that block's size, and lays these
and all longer-lived tensors. Each level is a mixed integer programme, solved by SciPy's HiGHS:

    minimise peak   such that   offset_i + size_i <= peak
                                offset_i + size_i <= offset_j + M (1 - z_ij),   z_ij + z_ji >= 1   where lifetimes meet

The bytes that live at once are a lower bound; best fit, largest first, is what a simple planner would reach. Where the
solver finds nothing better in its time, best fit stays. A program with these addresses needs no allocator, and an
allocator that may not move memory needs at least so much. The page pool on CPUs moves it and reaches the lower bound
without a plan, so this is a figure of `satchel plan --explain`, not a part of a run.
Paper: https://arxiv.org/abs/2407.12117 (section 4.3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from satchel.core.errors import UserError
from satchel.run.extend import BACKWARD, FORWARD
from satchel.run.tracker import Segment

PATIENCE_S = 5.0  # of the solver, for one level


@dataclass(frozen=True)
class Request:
    """Memory from one instant to another."""

    size: int  # bytes
    begin: int  # instant
    end: int  # the first instant without it

    def meets(self, other: Request) -> bool:
        """Whether both are alive at some instant."""
        return self.begin < other.end and other.begin < self.end


@dataclass(frozen=True)
class Layout:
    """An address for each request."""

    offsets: tuple[int, ...]
    peak_bytes: int
    best_fit_bytes: int  # what best fit needs for the same requests
    least_bytes: int  # what is alive at once


def lay_out(requests: Sequence[Request], patience_s: float = PATIENCE_S) -> Layout:
    """Offsets with the lowest peak that is found in time. Raises UserError where SciPy is missing."""
    least, greedy = alive_at_once(requests), best_fit(requests)
    greedy_peak = _peak(requests, greedy)
    offsets = greedy
    if greedy_peak > least:
        solved = _solve(requests, least, greedy_peak, patience_s)
        offsets = solved if solved and _peak(requests, solved) < greedy_peak else greedy
    return Layout(tuple(offsets), _peak(requests, offsets), greedy_peak, least)


def alive_at_once(requests: Iterable[Request]) -> int:
    """The most bytes that are alive at one instant."""
    changes = sorted(change for r in requests for change in ((r.begin, r.size), (r.end, -r.size)))
    return int(max(np.cumsum([size for _, size in changes]), default=0))


def best_fit(requests: Sequence[Request]) -> list[int]:
    """Offsets by best fit: largest first, each into the tightest gap among those that live beside it."""
    offsets = [0] * len(requests)
    placed: list[int] = []
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].size):
        beside = sorted(
            (offsets[i], offsets[i] + requests[i].size) for i in placed if requests[i].meets(requests[index])
        )
        offsets[index] = _tightest(beside, requests[index].size)
        placed.append(index)
    return offsets


def two_levels(segments: Sequence[Segment], patience_s: float = PATIENCE_S) -> tuple[Layout, Layout]:
    """The layouts of what passes within a layer, of the largest one, and of the whole run."""
    births, deaths = _lives(segments)
    inner: dict[int, list[Request]] = {}
    outer: list[Request] = []
    for number, (size, begin, where) in births.items():
        end, there = deaths.get(number, (len(segments) << 32, -1))
        if where == there and segments[where].name[1] in (FORWARD, BACKWARD):
            inner.setdefault(where, []).append(Request(size, begin, end))
        else:
            outer.append(Request(size, begin, end))
    blocks = {where: lay_out(requests, patience_s / len(inner)) for where, requests in inner.items()}
    outer += [Request(layout.peak_bytes, where << 32, (where + 1) << 32) for where, layout in blocks.items()]
    largest = max(blocks.values(), key=lambda layout: layout.peak_bytes, default=lay_out([]))
    return largest, lay_out(outer, patience_s)


def _lives(segments: Sequence[Segment]) -> tuple[dict[int, tuple[int, int, int]], dict[int, tuple[int, int]]]:
    """Size, instant and segment of each storage's birth; instant and segment of its death."""
    births, deaths = {}, {}
    for where, segment in enumerate(segments):
        for order, (number, size) in enumerate(segment.events):
            instant = (where << 32) + order
            if size > 0:
                births[number] = (size, instant, where)
            else:
                deaths[number] = (instant, where)
    return births, deaths


def _tightest(beside: list[tuple[int, int]], size: int) -> int:
    """Where a request goes among those at these addresses."""
    gaps, end = [], 0
    for start, stop in beside:
        if start - end >= size:
            gaps.append((start - end, end))
        end = max(end, stop)
    return min(gaps, default=(0, end))[1]


def _peak(requests: Sequence[Request], offsets: Sequence[int]) -> int:
    return max((offset + r.size for offset, r in zip(offsets, requests, strict=True)), default=0)


def _solve(requests: Sequence[Request], least: int, most: int, patience_s: float) -> list[int] | None:
    """The programme's offsets; None if the solver found none in time."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError:
        raise UserError("a plan of addresses needs SciPy: pip install 'satchel[layout]'") from None
    count = len(requests)
    pairs = [(i, j) for i, j in combinations(range(count), 2) if requests[i].meets(requests[j])]
    sizes = np.array([r.size for r in requests], dtype=float) / most  # in units of what best fit needs
    columns = count + len(pairs) + 1  # offsets; whether i lies below j; the peak
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []
    for index in range(count):
        entries += [(len(limits), index, 1.0), (len(limits), columns - 1, -1.0)]
        limits.append(-sizes[index])
    for number, (i, j) in enumerate(pairs, count):
        entries += [(len(limits), i, 1.0), (len(limits), j, -1.0), (len(limits), number, 1.0)]
        limits.append(1.0 - sizes[i])
        entries += [(len(limits), j, 1.0), (len(limits), i, -1.0), (len(limits), number, -1.0)]
        limits.append(-sizes[j])
    rows, places, values = zip(*entries, strict=True)
    matrix = coo_array((values, (rows, places)), shape=(len(limits), columns)).tocsr()
    binary = np.zeros(columns)
    binary[count:-1] = 1
    lower, upper = np.zeros(columns), np.ones(columns)
    lower[-1] = least / most
    found = milp(
        np.eye(1, columns, columns - 1)[0],
        constraints=LinearConstraint(matrix, ub=np.array(limits)),  # pyright: ignore[reportArgumentType] - the same
        integrality=binary,
        bounds=Bounds(lower, upper),  # pyright: ignore[reportArgumentType] - arrays will do
        options={"time_limit": patience_s},
    )
    return None if found.x is None else _settled(requests, found.x[:count])


def _settled(requests: Sequence[Request], offsets: np.ndarray) -> list[int]:
    """Whole bytes in the order of the solution: each request as low as those that lie below it let it."""
    settled = [0] * len(requests)
    order = [int(i) for i in np.argsort(offsets, kind="stable")]
    for number, index in enumerate(order):
        below = (i for i in order[:number] if requests[i].meets(requests[index]))
        settled[index] = max((settled[i] + requests[i].size for i in below), default=0)
    return settled
