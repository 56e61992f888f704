"""Tensors in files, and reading them into tensors that exist already.

A `Reader` maps a file, decodes a piece of a tensor at a time straight into its destination, which may have another
dtype, another device and any strides, and gives the file's pages back as it goes. So a load never holds two copies:
beside the destination there is one piece of PIECE numbers. A `FakeReader` rehearses that without files.
"""

import contextlib
import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from satchel.core.errors import ModelError
from satchel.model.encodings import ENCODINGS, Encoding

PIECE = 1 << 15  # numbers decoded at a time: what torch does on one thread, within a core's own cache
WINDOW = 1 << 22  # bytes of a file that stay resident; the kernel maps some more around what is touched


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


@dataclass(frozen=True)
class Part:
    """Where the numbers of one parameter lie in a stored tensor: they follow one another, or `make` picks them out."""

    stored: str  # the tensor's name
    first: int = 0  # its first number that is ours, counted row by row
    shift: float = 0.0  # added to every number
    into: Callable[[Tensor], Tensor] | None = None  # from the parameter to its view in the stored order
    make: Callable[[Tensor], Tensor] | None = None  # from the whole stored tensor to the parameter


class Reader:
    """Reads the tensors of one model, which may lie in several files. A context manager: it closes its maps."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # ctrl-C while a piece was read: its frame still holds the bytes
                mapped.close()
        self._maps.clear()

    def read(self, part: Part, out: Tensor) -> None:
        """Fill `out` with the numbers of a part, cast to its dtype."""
        stored = self.tensors[part.stored]
        if part.make is not None:
            whole = torch.empty(stored.shape, dtype=out.dtype)
            self._fill(stored, whole, 0, part.shift)
            out.copy_(part.make(whole))
        else:
            self._fill(stored, out if part.into is None else part.into(out), part.first, part.shift)

    def blocks(self, part: Part, shape: Sequence[int]) -> tuple[Tensor, str] | None:
        """A matrix as its file holds it: bytes of each row, [O, B], and their kind.

        None where these are neither blocks nor bfloat16.

        The bytes are those of the file itself, mapped, unless the rows are in another order there.
        """
        stored = self.tensors.get(part.stored)
        if stored is None or part.make is not None or part.shift:
            return None
        plain = stored.encoding.values == 1
        if plain and stored.dtype != "BF16":
            return None
        values, nbytes = stored.encoding.values, stored.encoding.nbytes
        self.release()
        raw = self.raw(stored, part.first // values * nbytes, math.prod(shape) // values * nbytes)
        rows = (raw.view(torch.bfloat16) if plain else raw).view(shape[0], -1)
        if part.into is not None:
            found, rows = rows, torch.empty_like(rows)
            view = part.into(rows)
            view.copy_(found.view(view.shape))
        return rows.view(torch.uint8), stored.dtype

    def _fill(self, stored: Stored, view: Tensor, first: int, shift: float) -> None:
        for piece, index in self.pieces(view, first):
            values = self._values(stored, index, piece.numel())
            piece.copy_((values.float() + shift if shift else values).view(piece.shape))
            del values
            self.release()

    def _values(self, stored: Stored, first: int, count: int) -> Tensor:
        """Numbers [first, first + count) of a tensor, flat; they lie in whole blocks."""
        encoding = stored.encoding
        raw = self.raw(stored, first // encoding.values * encoding.nbytes, count // encoding.values * encoding.nbytes)
        return encoding.decode(raw.view(-1, encoding.nbytes)).flatten()

    def pieces(self, view: Tensor, first: int) -> Iterator[tuple[Tensor, int]]:
        """The slices of a view that are read at a time, each with the index of its first number."""
        return pieces(view, first)

    def raw(self, stored: Stored, start: int, nbytes: int) -> Tensor:
        """Bytes [start, start + nbytes) of a tensor, uint8 [nbytes]; mapped, so valid until `release`."""
        mapped = self._maps.get(stored.path) or self._map(stored.path)
        if stored.start + start + nbytes > len(mapped):
            raise ModelError(f"{stored.path}: '{stored.name}' ends past the end of the file; fetch the file again")
        self._touched += nbytes
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=stored.start + start)

    def release(self) -> None:
        """Give the files' pages back once WINDOW bytes were touched: the kernel keeps them cached, we do not."""
        if self._touched >= WINDOW and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def _map(self, path: Path) -> mmap.mmap:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants it writable
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        self._maps[path] = mapped
        return mapped


def pieces(out: Tensor, first: int) -> Iterator[tuple[Tensor, int]]:
    """Slices of `out` of at most PIECE numbers, each with the index of its first number, counted on from `first`."""
    if out.numel() <= PIECE or out.dim() == 0:
        yield out, first
        return
    row = out[0].numel()
    if row > PIECE and out.dim() > 1:
        for i in range(out.shape[0]):
            yield from pieces(out[i], first + i * row)
        return
    step = max(1, PIECE // row)
    for i in range(0, out.shape[0], step):
        yield out[i : i + step], first + i * row


class FakeReader(Reader):
    """Rehearses a load under FakeTensorMode: the same temporaries, for the first piece of each tensor, and no file."""

    def pieces(self, view: Tensor, first: int) -> Iterator[tuple[Tensor, int]]:
        """Only the first: the others take the same memory, one after the other."""
        return itertools.islice(pieces(view, first), 1)

    def raw(self, stored: Stored, start: int, nbytes: int) -> Tensor:
        """Bytes without values."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def release(self) -> None:
        """Nothing is mapped."""
