"""What the next step runs: who goes on, who enters, who makes room.

Every running answer gets its next token before any prompt gets a part, so that long prompts do not stall answers; what
is left of a step's tokens goes to prompts, in parts if need be. The order of both is the admission's. A sequence enters
when there are blocks for all it has; when a running one finds no block, the least urgent one makes room: it forgets its
keys and values, waits, and computes them anew later, except for those that are still found in the pool by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

from satchel.core.errors import UserError
from satchel.core.serve_seams import Admission
from satchel.run.adapters import Adapter, Adapters
from satchel.run.blocks import Blocks, digests
from satchel.run.ledger import Ledger
from satchel.run.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """What a step may take."""

    blocks: int  # of the pool
    batch: int = 64  # sequences that run at once
    step_tokens: int = 512  # that the model sees in one step
    context: int = 2048  # longest sequence


@dataclass
class Turn:
    """The work of one step."""

    work: dict[Sequence, int] = field(default_factory=dict)  # how many of its pending tokens each one runs
    failed: dict[Sequence, str] = field(default_factory=dict)  # what cannot run, and why

    @property
    def tokens(self) -> int:
        """Of the whole step."""
        return sum(self.work.values())


class Scheduler:
    """The sequences that wait and that run, and their blocks."""

    def __init__(
        self,
        limits: Limits,
        blocks: Blocks,
        admission: Admission,
        adapters: Adapters,
        clock: Callable[[], float],
        copy: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        """`copy` copies blocks of the pool, each (from, to)."""
        self.limits, self.blocks, self.admission, self.adapters = limits, blocks, admission, adapters
        self._displaces = type(admission).displaces is not Admission.displaces
        self.clock, self.copy = clock, copy
        self.waiting: dict[Sequence, None] = {}  # in the order of arrival
        self.running: dict[Sequence, None] = {}
        self.ledger = Ledger()
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self.ledger.arrive(sequence.tenant, {s.tenant for s in (*self.waiting, *self.running)})
        self.waiting[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended, wherever it was."""
        self.waiting.pop(sequence, None)
        self._stop(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A sequence with the same tokens as a running one shares its blocks, if there is room to run it now."""
        self.add(child)
        if len(self.running) < self.limits.batch:
            self._host(child)
            self._hold(child, parent.table)
            child.cached = len(child.tokens)
            self._run(child)

    def next(self) -> Turn:
        """Choose the work of a step, and take the blocks that it needs. Waits only where all that runs does, for its
        blocks from the shelf."""
        turn = self._turn()
        while not turn.work and not turn.failed and (late := next((s for s in self.running if s.arrival), None)):
            self._land(late)
            turn = self._turn()
        for sequence, count in turn.work.items():
            self._charge(sequence, sequence.cached + count)
        self.blocks.foresee(self.blocks.needed(self.limits.step_tokens) + self.limits.batch)
        return turn

    def _turn(self) -> Turn:
        turn, now = Turn(), self.clock()
        order = sorted(self.running, key=lambda sequence: self._rank(sequence, now))
        for sequence in sorted(order, key=lambda sequence: sequence.pending > 1):  # answers before prompts
            if sequence in self.running:
                self._go_on(sequence, turn, order)
        full = len(self.running) >= self.limits.batch and not self._displaces
        for sequence in [] if full else sorted(self.waiting, key=lambda sequence: self._rank(sequence, now)):
            if turn.tokens == self.limits.step_tokens:
                break
            try:
                if not self._enter(sequence, turn, order):
                    break
            except UserError as fault:  # of its adapter's folder
                turn.failed[sequence] = str(fault)
        return turn

    def extend(self, sequence: Sequence, tokens: int) -> int:
        """Blocks for up to so many tokens beyond those of the sequence, without disturbing others; how many fit."""
        size = self.blocks.size
        room = (len(sequence.table) + self.blocks.free) * size - len(sequence.tokens)
        fits = max(0, min(tokens, room))
        self._grow(sequence, len(sequence.tokens) + fits)
        return fits

    def trim(self, sequence: Sequence, tokens: int) -> None:
        """Give back the blocks beyond those for so many tokens more than the sequence has."""
        while len(sequence.table) > self.blocks.needed(len(sequence.tokens) + tokens):
            self.blocks.release(sequence.table.pop())

    def seen(self, sequence: Sequence, cached: int) -> None:
        """The model has seen the first `cached` tokens; full blocks become findable."""
        if sequence not in self.running:
            return
        before, sequence.cached = sequence.cached // self.blocks.size, cached
        full = cached // self.blocks.size
        if full > len(sequence.digests):
            sequence.digests = digests(sequence.tokens, self.blocks.size, sequence.root, sequence.digests)
        for index in range(before, full):
            self.blocks.publish(sequence.table[index], sequence.digests[index])

    def check_integrity(self) -> None:
        """Raises SatchelError where the pool and the sequences' tables contradict each other."""
        tables = [s.table for s in (*self.running, *self.waiting)]
        self.blocks.check_integrity([*tables, *self.adapters.runs()])

    def _rank(self, sequence: Sequence, now: float) -> tuple[float, ...]:
        return *self.admission.rank(sequence, self.ledger.served(sequence.tenant), now), sequence.id, sequence.index

    def _go_on(self, sequence: Sequence, turn: Turn, order: list[Sequence]) -> None:
        """Give a running sequence its tokens of this step; the least urgent ones make room for it."""
        if not self._arrived(sequence):
            return
        count = min(sequence.pending, self.limits.step_tokens - turn.tokens)
        if not count:
            return
        while not self._ready(sequence, sequence.cached + count):
            victim = next(s for s in reversed(order) if s in self.running)
            self._preempt(victim, turn)
            if victim is sequence:
                return
        turn.work[sequence] = count

    def _enter(self, sequence: Sequence, turn: Turn, order: list[Sequence]) -> bool:
        """Let a waiting sequence run if there is room, or those that it displaces make some."""
        while (found := self._room(sequence)) is None:
            victim = next((s for s in reversed(order) if s in self.running), None)
            if victim is None or not self.admission.displaces(sequence, victim):
                return False
            self._preempt(victim, turn)
        self._hold(sequence, found)
        self._fetch(sequence)
        self._grow(sequence, len(sequence.tokens))
        self._run(sequence)
        if self._arrived(sequence):
            turn.work[sequence] = min(sequence.pending, self.limits.step_tokens - turn.tokens)
        return True

    def _reusable(self, sequence: Sequence) -> list[int]:
        """Blocks of the pool that hold the sequence's beginning; its last token is always computed."""
        if self._computes_all(sequence):
            return []
        sequence.digests = digests(sequence.tokens, self.blocks.size, sequence.root, sequence.digests)
        return self.blocks.match(sequence.digests[: (len(sequence.tokens) - 1) // self.blocks.size])

    @staticmethod
    def _computes_all(sequence: Sequence) -> bool:
        return sequence.request.runs_prompt and not sequence.said_count

    def _fetch(self, sequence: Sequence) -> None:
        """Go on from the known blocks that it holds with those that the shelf has."""
        full = 0 if self._computes_all(sequence) else (len(sequence.tokens) - 1) // self.blocks.size
        sequence.cached = len(sequence.table) * self.blocks.size
        wanted = list(takewhile(self.blocks.shelved, sequence.digests[len(sequence.table) : full]))
        if wanted:
            table, sequence.arrival = self.blocks.fetch(wanted)
            sequence.table += table
        self._note_reuse(sequence)

    def _arrived(self, sequence: Sequence) -> bool:
        """Whether nothing of it is on its way from the shelf any more."""
        if sequence.arrival is not None and sequence.arrival.done:
            self._land(sequence)
        return sequence.arrival is None

    def _land(self, sequence: Sequence) -> None:
        """Wait for what is on its way; it counts as seen from then on, and others find it."""
        if sequence.arrival is None:
            return
        first = sequence.cached // self.blocks.size
        arrived, sequence.arrival = sequence.arrival.wait(), None
        sequence.cached += arrived * self.blocks.size
        for index in range(first, first + arrived):
            self.blocks.publish(sequence.table[index], sequence.digests[index])
        self._note_reuse(sequence)

    @staticmethod
    def _note_reuse(sequence: Sequence) -> None:
        if not sequence.said_count:
            sequence.reused = sequence.cached

    def _room(self, sequence: Sequence) -> list[int] | None:
        """Its adapter in the pool, and blocks enough for all it has: the known ones among them. None if there is no
        room for it."""
        if len(self.running) >= self.limits.batch or not self._host(sequence):
            return None
        found = self._reusable(sequence)
        idle = sum(block in self.blocks.idle for block in found)
        if self._reclaim(self.blocks.needed(len(sequence.tokens) + 1) - len(found) + idle):
            return found
        self._leave(sequence)
        return None

    def _reclaim(self, count: int) -> bool:
        """Whether so many blocks are free, after adapters that nobody uses were forgotten for them."""
        while self.blocks.free < count and (adapter := self.adapters.unused()):
            self.blocks.release_run(self.adapters.unload(adapter))
        return self.blocks.free >= count

    def _host(self, sequence: Sequence) -> bool:
        """Bring its adapter into the pool, if it has one, and hold on to it. Raises ModelError if it cannot be read."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        if adapter not in self.adapters.resident:
            for other in self.running:
                self._land(other)  # its blocks may have to move
            while (run := self.blocks.take_run(adapter.blocks)) is None:
                if (unused := self.adapters.unused()) is None:
                    return False
                self.blocks.release_run(self.adapters.unload(unused))
            self._move(run[1])
            self._load(adapter, range(run[0], run[0] + adapter.blocks))
        self.adapters.use(adapter)
        return True

    def _load(self, adapter: Adapter, run: range) -> None:
        try:
            self.adapters.load(adapter, run.start)
        except BaseException:
            self.blocks.release_run(run)
            raise

    def _leave(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self.adapters.leave(sequence.adapter)

    def _move(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, and let their holders follow."""
        self.copy(pairs)
        moved = dict(pairs)
        for sequence in self.running if moved else ():
            sequence.table = [moved.get(block, block) for block in sequence.table]

    def _charge(self, sequence: Sequence, seen: int) -> None:
        fresh = seen - max(sequence.charged, sequence.reused)
        if fresh > 0:
            self.ledger.charge(sequence.tenant, fresh, sequence.said_count > 0)
            sequence.charged = seen

    def _ready(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks of its own for the tokens up to so many; False if there are not enough."""
        at = sequence.cached // self.blocks.size
        shared = at < len(sequence.table) and self.blocks.refs[sequence.table[at]] > 1
        if not self._reclaim(self.blocks.needed(tokens) - len(sequence.table) + shared):
            return False
        if shared:
            old, sequence.table[at] = sequence.table[at], self.blocks.take()
            self.blocks.release(old)
            self.copy([(old, sequence.table[at])])
        self._grow(sequence, tokens)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.table) * self.blocks.size < tokens:
            sequence.table.append(self.blocks.take(sequence.table[-1] if sequence.table else None))

    def _hold(self, sequence: Sequence, table: list[int]) -> None:
        for block in table:
            self.blocks.share(block)
        sequence.table = list(table)

    def _run(self, sequence: Sequence) -> None:
        del self.waiting[sequence]
        self.running[sequence] = None

    def _preempt(self, sequence: Sequence, turn: Turn) -> None:
        turn.work.pop(sequence, None)
        self._stop(sequence)
        self.waiting[sequence] = None
        sequence.preempted += 1
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        """Give back what a sequence holds. Its last blocks are forgotten first: a beginning may be shared by others."""
        if sequence not in self.running:
            return
        self._land(sequence)
        del self.running[sequence]
        self._leave(sequence)
        for block in reversed(sequence.table):
            self.blocks.release(block)
        sequence.table, sequence.cached = [], 0
