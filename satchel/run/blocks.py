"""Who holds which block of the pool: reference counts, reuse of prefixes, the oldest unused block first to go.

A block holds the keys and values of SIZE tokens in all layers. A full block is published under a digest of all tokens
up to its end (and of what else its values depend on, such as the adapter), so that a later sequence with the same
beginning takes it over. A block that nobody holds stays findable until its place is needed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate, islice

from satchel.core.errors import SatchelError
from satchel.core.serve_seams import Arrival, Shelf

Digest = bytes
AHEAD = 4  # times what the next step may overwrite, that a shelf hears of


def digests(tokens: Sequence[int], size: int, root: Digest, known: Sequence[Digest] = ()) -> list[Digest]:
    """A digest for each full block of `tokens`; each continues the one before, the first continues `root`.

    `known` are those of the first blocks, if they were made before.
    """
    found = list(known)
    for end in range((len(found) + 1) * size, len(tokens) + 1, size):
        parent = found[-1] if found else root
        found.append(blake2b(parent + array("I", tokens[end - size : end]).tobytes(), digest_size=16).digest())
    return found


class Blocks:
    """The blocks of a pool, by number. Knows no tensors."""

    def __init__(self, count: int, size: int, shelf: Shelf | None = None) -> None:
        """`shelf`: what gets a published block before its place goes to another."""
        self.count, self.size, self.shelf = count, size, shelf
        self.refs = [0] * count
        self.digest: list[Digest | None] = [None] * count
        self.found: dict[Digest, int] = {}  # published blocks
        self.empty = dict.fromkeys(range(count - 1, -1, -1))  # nobody holds them, nothing in them; the last goes first
        self.pinned: set[int] = set()  # held, and not to be moved
        self.idle: OrderedDict[int, None] = OrderedDict()  # nobody holds them, published; the oldest first

    @property
    def free(self) -> int:
        """Blocks that can be taken now."""
        return len(self.empty) + len(self.idle)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.count - self.free

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.size)

    def match(self, chain: Iterable[Digest]) -> list[int]:
        """The published blocks of the longest known beginning of `chain`; they are not yet taken."""
        blocks = []
        for digest in chain:
            if (block := self.found.get(digest)) is None:
                break
            blocks.append(block)
        return blocks

    def take(self, after: int | None = None) -> int:
        """A block for new tokens: the neighbour of `after` if it is empty, so that both move by one copy; the one
        longest unused is forgotten for it if none is empty."""
        if after is not None and after + 1 in self.empty:
            del self.empty[block := after + 1]
        elif self.empty:
            block, _ = self.empty.popitem()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)
            self._evict(block)
        else:
            raise SatchelError("the pool has no free block")
        self.refs[block] = 1
        return block

    def take_run(self, count: int) -> tuple[int, list[tuple[int, int]]] | None:
        """Contiguous blocks that stay where they are: the first of them, and the blocks to copy, each (from, to), out
        of their way; the holders' tables are to follow. None if what stays leaves no room."""
        if count > self.free or (start := self._clearest(count)) is None:
            return None
        run = range(start, start + count)
        moved = [block for block in run if self.refs[block]]
        for block in run:
            if not self.refs[block]:
                self._claim(block)
        pairs = [(block, self._move(block)) for block in moved]
        for block in run:
            self.refs[block] = 1
        self.pinned.update(run)
        return start, pairs

    def release_run(self, run: range) -> None:
        """Give back what `take_run` gave."""
        for block in run:
            self.pinned.remove(block)
            self.release(block)

    def share(self, block: int) -> None:
        """One holder more; the block may be idle."""
        self.idle.pop(block, None)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one leaves a published block findable."""
        self.refs[block] -= 1
        if self.refs[block]:
            return
        if self.digest[block] is None:
            self.empty[block] = None
        else:
            self.idle[block] = None

    def publish(self, block: int, digest: Digest) -> None:
        """The block is full; sequences that begin like `digest` may take it over. The first of equal blocks is kept."""
        if self.digest[block] is None and digest not in self.found:
            self.digest[block] = digest
            self.found[digest] = block

    def forget_all(self) -> None:
        """Nothing is findable any more, as if the pool were new; held blocks stay held."""
        for block in list(self.found.values()):
            self._settle(block)
            self._forget(block)
        self.empty |= self.idle
        self.idle.clear()

    def _clearest(self, count: int) -> int | None:
        """Where so many contiguous blocks hold the fewest that would have to move; the last of equals."""
        held = list(accumulate((self.refs[b] > 0 for b in range(self.count)), initial=0))
        fixed = list(accumulate((b in self.pinned for b in range(self.count)), initial=0))
        starts = [s for s in range(self.count - count + 1) if fixed[s + count] == fixed[s]]
        return min(starts, key=lambda s: (held[s + count] - held[s], -s), default=None)

    def _claim(self, block: int) -> None:
        """Take this very block, which nobody holds."""
        if block in self.idle:
            del self.idle[block]
            self._evict(block)
        else:
            del self.empty[block]

    def _move(self, block: int) -> int:
        """Another block takes over this one's holders and digest."""
        self._settle(block)
        target = self.take()
        self.refs[target], self.refs[block] = self.refs[block], 0
        if (digest := self.digest[block]) is not None:
            self._forget(block)
            self.publish(target, digest)
        return target

    def _evict(self, block: int) -> None:
        digest = self.digest[block]
        if self.shelf is not None and digest is not None:
            self.shelf.keep(digest, block)
        self._forget(block)

    def shelved(self, digest: Digest) -> bool:
        """Whether the shelf has the block of this digest."""
        return self.shelf is not None and self.shelf.has(digest)

    def fetch(self, wanted: Sequence[Digest]) -> tuple[list[int], Arrival]:
        """Blocks for the tokens of these digests, and their arrival from the shelf. Publish those that are there."""
        assert self.shelf is not None
        blocks = sorted(self.take() for _ in wanted)
        return blocks, self.shelf.fetch(list(zip(wanted, blocks, strict=True)))

    def foresee(self, count: int) -> None:
        """Tell the shelf which published blocks the next `count` that are taken would overwrite, and some more, in the
        order of their tokens: the last blocks of a sequence are the first to go."""
        if self.shelf is not None and (short := AHEAD * count - len(self.empty)) > 0:
            next_ones = [(digest, b) for b in islice(self.idle, short) if (digest := self.digest[b]) is not None]
            self.shelf.foresee(next_ones[::-1])

    def _settle(self, block: int) -> None:
        if self.shelf is not None:
            self.shelf.settle(block)

    def _forget(self, block: int) -> None:
        digest, self.digest[block] = self.digest[block], None
        if digest is not None:
            del self.found[digest]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises SatchelError where counts, lists and the tables of all holders contradict each other."""
        holders = [0] * self.count
        for table in tables:
            for block in table:
                holders[block] += 1
        wrong = [block for block in range(self.count) if holders[block] != self.refs[block]]
        if wrong:
            block = wrong[0]
            raise SatchelError(f"pool: block {block} has {holders[block]} holders and counts {self.refs[block]}")
        unheld = sorted([*self.empty, *self.idle])
        if unheld != [block for block in range(self.count) if not self.refs[block]]:
            raise SatchelError("pool: the lists of free blocks are not the blocks that nobody holds")
        if any(self.digest[block] is not None for block in self.empty) or any(
            self.digest[block] is None for block in self.idle
        ):
            raise SatchelError("pool: an empty block is published, or an idle one is not")
        if any(self.digest[block] != digest for digest, block in self.found.items()):
            raise SatchelError("pool: a digest leads to another block")
