"""Tensors in files, and reading them into tensors that exist already.

A `Reader` maps a file, decodes a piece of a tensor at a time straight into its destination, which may have another
dtype, another device and any strides, and gives the file's pages back as it goes. So a load never holds two copies:
beside the destination there is one piece of PIECE numbers. Subclasses replace `raw`, and thereby rehearse a load.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from satchel.core.errors import ModelError
from satchel.model.encodings import ENCODINGS, Encoding

PIECE = 1 << 15  # numbers decoded at a time: what torch does on one thread, within a core's own cache


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a name from ENCODINGS: 'BF16', 'Q4_1', ...
    path: Path
    start: int  # its first byte in the file

    @property
    def encoding(self) -> Encoding:
        return ENCODINGS[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.encoding.values * self.encoding.nbytes


class Reader:
    """Reads the tensors of one model, which may lie in several files. A context manager: it closes its maps."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()

    def read(self, name: str, out: Tensor, first: int = 0) -> None:
        """Fill `out` with the tensor's numbers from the `first` on, row by row, cast to its dtype."""
        stored = self.tensors[name]
        encoding = stored.encoding
        for piece, index in _pieces(out, first):
            start = index // encoding.values * encoding.nbytes
            raw = self.raw(stored, start, piece.numel() // encoding.values * encoding.nbytes)
            piece.copy_(encoding.decode(raw.view(-1, encoding.nbytes)).view(piece.shape))
            del raw
            self.release(stored, start)

    def raw(self, stored: Stored, start: int, nbytes: int) -> Tensor:
        """Bytes [start, start + nbytes) of a tensor, uint8 [nbytes]; mapped, so valid until `release`."""
        mapped = self._maps.get(stored.path) or self._map(stored.path)
        if stored.start + start + nbytes > len(mapped):
            raise ModelError(f"{stored.path}: '{stored.name}' ends past the end of the file; fetch the file again")
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=stored.start + start)

    def release(self, stored: Stored, start: int) -> None:
        """Give back the file's pages around byte `start` of a tensor: the kernel keeps them cached, we do not."""
        if (mapped := self._maps.get(stored.path)) is not None:
            page = (stored.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
            window = 64 * PIECE  # covers a piece of the widest type, and what the kernel mapped around it
            mapped.madvise(mmap.MADV_DONTNEED, page, min(window, len(mapped) - page))

    def _map(self, path: Path) -> mmap.mmap:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants it writable
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        self._maps[path] = mapped
        return mapped


def _pieces(out: Tensor, first: int) -> Iterator[tuple[Tensor, int]]:
    """Slices of `out` of at most PIECE numbers (or one row), each with the index of its first number."""
    if out.numel() <= PIECE or out.dim() == 0:
        yield out, first
        return
    row = out[0].numel()
    if row > PIECE and out.dim() > 1:
        for i in range(out.shape[0]):
            yield from _pieces(out[i], first + i * row)
        return
    step = max(1, PIECE // row)
    for i in range(0, out.shape[0], step):
        yield out[i : i + step], first + i * row
