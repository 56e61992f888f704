"""Keys and values that lose their place in the pool go to disk, or from a GPU to the host's memory, and come back.

Of FastSwitch's three ideas, in the form that a pool of this layout gives them:

    coarse moves   a block holds all layers of its tokens side by side: it moves by one copy, not two a layer
    reuse          what is on the shelf is known by the digest of its tokens and stays there after it came back, so that
                   only what was written since moves again, for the next preemption and the next turn of a conversation
    overlap        writes end in the system's cache; the disk follows in its own time

Since a block is known by its tokens and not by its owner, a shelf also lengthens the memory for common beginnings.
Saves computing what was preempted, and spends disk of `size`; the longest unused goes first. Blocks that are not full
are computed again: at most 15 tokens of an answer. A full disk makes the shelf smaller, nothing else.
Paper: https://arxiv.org/abs/2411.18424
"""

import os
import tempfile
from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from satchel.core.card import Card
from satchel.core.serve_seams import Preemption, Shelf
from satchel.core.units import parse_bytes


class _Slots(Shelf):
    """Places of one block each, by digest; the longest unused is given away when none is left."""

    def __init__(self, data: Tensor, size_bytes: int) -> None:
        self.data = data
        self.count = size_bytes // data[0].nbytes
        self.slots: OrderedDict[bytes, int] = OrderedDict()

    def keep(self, digest: bytes, block: int) -> None:
        if digest in self.slots:
            self.slots.move_to_end(digest)
            return
        if len(self.slots) < self.count:
            slot = len(self.slots)
        elif self.slots:
            _, slot = self.slots.popitem(last=False)
        else:
            return
        if self.write(slot, self.data[block]):
            self.slots[digest] = slot
            self.moved_out += 1
        else:
            self.count = len(self.slots)

    def has(self, digest: bytes) -> bool:
        return digest in self.slots

    def fetch(self, digest: bytes, block: int) -> bool:
        if digest not in self.slots or not self.read(self.slots[digest], self.data[block]):
            return False
        self.slots.move_to_end(digest)
        self.moved_in += 1
        return True

    @abstractmethod
    def write(self, slot: int, block: Tensor) -> bool:
        """Whether the block lies in the slot now."""

    @abstractmethod
    def read(self, slot: int, block: Tensor) -> bool:
        """Whether the slot lies in the block now."""


class _OnDisk(_Slots):
    """Slots in a file that has no name: it is gone when the process is, however that ends."""

    def __init__(self, data: Tensor, size_bytes: int, folder: str) -> None:
        super().__init__(data, size_bytes)
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder or None, buffering=0)  # noqa: SIM115

    def write(self, slot: int, block: Tensor) -> bool:
        try:
            return os.pwrite(self.file.fileno(), _bytes(block), slot * block.nbytes) == block.nbytes
        except OSError:
            return False

    def read(self, slot: int, block: Tensor) -> bool:
        try:
            return os.preadv(self.file.fileno(), [_bytes(block)], slot * block.nbytes) == block.nbytes
        except OSError:
            return False


class _OnHost(_Slots):
    """Slots in the host's memory, for a pool on a GPU; pinned, so that copies are as fast as the link."""

    def __init__(self, data: Tensor, size_bytes: int) -> None:
        super().__init__(data, size_bytes)
        self.host = torch.empty(self.count, *data.shape[1:], dtype=data.dtype, pin_memory=True)

    def write(self, slot: int, block: Tensor) -> bool:
        self.host[slot].copy_(block)
        return True

    def read(self, slot: int, block: Tensor) -> bool:
        block.copy_(self.host[slot])
        return True


def _bytes(block: Tensor) -> memoryview:
    return block.flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True, kw_only=True)
class Fastswitch(Preemption):
    """See the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2411.18424",
        saves=("compute",),
        spends=("disk",),
        claim="1.4 to 11.2 times shorter tails of the times to first token and between tokens than vLLM",
        demo={"size": "1MiB"},
    )

    size: str = "1GiB"  # of the shelf
    folder: str = ""  # where its file lies; empty: where the system keeps temporary files

    def __post_init__(self) -> None:
        parse_bytes(self.size)

    def start(self, data: Tensor) -> Shelf:
        """An empty shelf. Raises UserError if its file cannot be made."""
        if data.device.type == "cuda":
            return _OnHost(data, parse_bytes(self.size))
        try:
            return _OnDisk(data, parse_bytes(self.size), self.folder)
        except OSError as fault:
            self.require(False, f"folder={self.folder}: no file can be made there: {fault.strerror}; name another one")
            raise
