"""From a tracked run of a shallow model to the whole one.

The run is a row of segments. Those of a block, forward or backward, stand once for every layer of the deep model that
is like theirs; in all other segments a storage that belongs to a layer counts once for every such layer. So levels and
peaks of the deep model follow without adding up component by component, at every instant of the run. Exact where layers
of one kind are identical.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from satchel.run.tracker import Label, Segment, Tracker, Work

FORWARD, BACKWARD = "forward", "backward"  # segments named (phase, FORWARD, layer)


@dataclass(frozen=True)
class Phase:
    """A stretch of the job with a peak of its own."""

    name: str
    peak_bytes: int
    accounts: dict[str, int]  # bytes by account at the peak


@dataclass(frozen=True)
class _Outline:
    """A segment without its events: how far it rises, what it leaves."""

    name: tuple
    peak: int  # above its start
    at_peak: Counter[str]
    net: Counter[str]
    work: Counter[Work]


def shallow(kinds: Sequence[Hashable]) -> list[int]:
    """The fewest layers that show the first, the last, and one of each kind between them, neighbours included.

    A block may free or fetch what its neighbours keep, so two layers are of one kind only if their neighbours are.
    """
    between = {kind: layer for layer, kind in reversed(list(enumerate(_with_neighbours(kinds), 1)))}
    return sorted({0, *between.values(), len(kinds) - 1})


def stand_ins(kinds: Sequence[Hashable], layers: Sequence[int]) -> list[int]:
    """For each layer of the deep model, which of the shallow one's `layers` stands for it."""
    between = _with_neighbours(kinds)
    places = {between[layer - 1]: place for place, layer in enumerate(layers[1:-1], 1)}
    return [0, *(places[kind] for kind in between), len(layers) - 1][: len(kinds)]


def _with_neighbours(kinds: Sequence[Hashable]) -> list[Hashable]:
    """The kinds of all layers but the first and the last."""
    return list(zip(kinds, kinds[1:], kinds[2:], strict=False))


def extend(tracker: Tracker, stands: Sequence[int]) -> list[Phase]:
    """The phases of the deep model; a phase is the first part of a segment's name. `stands` is from `stand_ins`."""
    copies = Counter(stands)
    labels = _book(tracker)
    outlines = [_outline(segment, labels, copies) for segment in tracker.segments]
    level: Counter[str] = Counter()
    phases: dict[str, Phase] = {}
    for outline in _deepen(outlines, stands):
        name, total = outline.name[0], level.total() + outline.peak
        if name not in phases or total > phases[name].peak_bytes:
            accounts = {a: level[a] + outline.at_peak[a] for a in level | outline.at_peak}
            phases[name] = Phase(name, total, {a: size for a, size in accounts.items() if size > 0})
        level.update(outline.net)
    return list(phases.values())


def total_work(segments: Sequence[Segment], stands: Sequence[int]) -> Counter[Work]:
    """The work of these segments in the deep model."""
    total: Counter[Work] = Counter()
    for segment in _deepen(segments, stands):
        for item, count in segment.work.items():
            total[item] += count
    return total


def _deepen(segments: Sequence, stands: Sequence[int]) -> Iterator:
    """The segments in order, each run of block segments replaced by that of the deep model."""
    at = 0
    while at < len(segments):
        direction = segments[at].name[1:2]
        if direction not in ((FORWARD,), (BACKWARD,)):
            yield segments[at]
            at += 1
            continue
        blocks = {}
        while at < len(segments) and segments[at].name[1:2] == direction and segments[at].name[2] not in blocks:
            blocks[segments[at].name[2]] = segments[at]
            at += 1
        yield from (blocks[i] for i in (stands if direction == (FORWARD,) else reversed(stands)) if i in blocks)


def _book(tracker: Tracker) -> dict[int, Label]:
    """A label for every storage. One that nobody labelled is an activation if it outlives the segment that made it."""
    labels = dict(tracker.labels)
    born: dict[int, int] = {}
    for index, segment in enumerate(tracker.segments):
        for number, size in segment.events:
            if number not in born:
                born[number] = index
                labels.setdefault(number, Label("activations", None))
            elif size <= 0 and born[number] == index and number not in tracker.labels:
                labels[number] = Label("workspace", None)
    return labels


def _outline(segment: Segment, labels: dict[int, Label], copies: Counter[int]) -> _Outline:
    block = segment.name[1:2] in ((FORWARD,), (BACKWARD,))
    level: Counter[str] = Counter()
    total = peak = 0
    at_peak: Counter[str] = Counter()
    for number, size in segment.events:
        account, layer = labels[number]
        size *= 1 if block or layer is None else copies[layer]
        level[account] += size
        total += size
        if total > peak:
            peak, at_peak = total, Counter(level)
    return _Outline(segment.name, peak, at_peak, level, segment.work)
