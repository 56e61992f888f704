"""The adapters of an engine: many registered, few in memory, each in contiguous blocks of the pool.

A registered adapter is a folder that was read once and found good. It is read again when a request needs it and it is
not in the pool; there it stays until its blocks are needed and no answer uses it, the longest unused one going first.
An answer holds on to the adapter that its request named when it came, whatever is registered under that name later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, file_digest
from pathlib import Path

from satchel.adapt import Low, each_peft, outline_peft
from satchel.core.errors import ModelError, UnknownName, UserError
from satchel.model.bank import Bank, LowRank, Span, Stored
from satchel.model.decoder import Decoder
from satchel.model.paged import Pool


@dataclass(frozen=True)
class Adapter:
    """A registered adapter."""

    name: str
    folder: Path
    root: bytes  # digest of its files: keys and values under it are found by nobody else
    blocks: int  # that it takes


@dataclass
class Resident:
    """An adapter in the pool."""

    stored: Stored
    start: int  # first block
    users: int = 0  # answers that run with it


class Adapters:
    """What is registered and what is in the pool."""

    def __init__(self, model: Decoder, pool: Pool) -> None:
        self.model, self.pool = model, pool
        self.registered: dict[str, Adapter] = {}
        self.resident: OrderedDict[Adapter, Resident] = OrderedDict()  # the longest unused first
        self.loads = 0

    @cached_property
    def bank(self) -> Bank:
        """Around the model's maps from the first registration on."""
        return Bank(self.model, self.pool.data)

    def register(self, name: str, folder: str | Path) -> None:
        """Make a folder known under a name. Raises UserError for a name that is taken, ModelError for what is wrong
        with the folder; nothing has changed then."""
        if name in self.registered:
            raise UserError(f"an adapter '{name}' is registered already; remove it first, or choose another name")
        folder = Path(folder)
        needs = -(-self.bank.numbers(self._outline(folder)) // self.pool.data[0].numel())
        if needs > self.pool.blocks:
            raise ModelError(f"{folder}: the adapter needs {needs} blocks and the pool has {self.pool.blocks}")
        self.registered[name] = Adapter(name, folder, _digest(folder), needs)

    def remove(self, name: str) -> None:
        """Forget a name; answers that are under way keep their adapter. Raises UnknownName."""
        self.find(name)
        del self.registered[name]

    def find(self, name: str) -> Adapter:
        """The adapter of that name. Raises UnknownName with the nearest."""
        if name not in self.registered:
            raise UnknownName("adapter", name, self.registered)
        return self.registered[name]

    def load(self, adapter: Adapter, start: int) -> None:
        """Read an adapter into blocks of the pool. Raises ModelError if its folder is not what was registered."""
        if _digest(adapter.folder) != adapter.root:
            raise ModelError(f"{adapter.folder}: adapter '{adapter.name}' has changed; remove and register it again")
        numbers = self.pool.data[0].numel()
        lows = ((path, _low_rank(low)) for path, low in each_peft(self.model, adapter.folder))
        stored = self.bank.store(lows, start * numbers)
        self.resident[adapter] = Resident(stored, start)
        self.loads += 1

    def use(self, adapter: Adapter) -> None:
        """One answer more runs with it."""
        self.resident[adapter].users += 1
        self.resident.move_to_end(adapter)

    def leave(self, adapter: Adapter) -> None:
        """One answer less."""
        self.resident[adapter].users -= 1

    def unused(self) -> Adapter | None:
        """The adapter in the pool that no answer has used for longest."""
        return next((adapter for adapter, there in self.resident.items() if not there.users), None)

    def unload(self, adapter: Adapter) -> range:
        """Forget where it is; the blocks that it had."""
        start = self.resident.pop(adapter).start
        return range(start, start + adapter.blocks)

    def using(self, rows: Iterable[tuple[Adapter | None, range]]) -> AbstractContextManager[None]:
        """In force for the model's next calls: adapters on rows, those of one adapter one after the other."""
        bounds: dict[Adapter, range] = {}
        for adapter, some in rows:
            if adapter is not None:
                bounds[adapter] = range(bounds.get(adapter, some).start, some.stop)
        if not bounds:
            return nullcontext()
        return self.bank.using([Span(r.start, r.stop, self.resident[a].stored) for a, r in bounds.items()])

    def runs(self) -> list[range]:
        """The blocks of each adapter in the pool."""
        return [range(there.start, there.start + adapter.blocks) for adapter, there in self.resident.items()]

    def _outline(self, folder: Path) -> dict[str, LowRank]:
        """Without numbers: an adapter may be larger than what is left of the memory."""
        lows = outline_peft(self.model, folder)
        if any(low.m_O is not None for low in lows.values()):
            raise ModelError(f"{folder}: DoRA cannot be served beside other adapters; merge it into its own model")
        return {path: _low_rank(low) for path, low in lows.items()}


def _low_rank(low: Low) -> LowRank:
    return LowRank(low.A_RI, low.B_OR, low.method.scale)


def _digest(folder: Path) -> bytes:
    digest = blake2b(digest_size=16)
    for path in sorted(folder.glob("adapter_*")):
        try:
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + file_digest(file, blake2b).digest())
        except OSError as fault:
            raise ModelError(f"{path}: cannot be read: {fault.strerror}") from None
    return digest.digest()
