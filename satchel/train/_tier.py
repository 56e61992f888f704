"""The second tier of activation memory: where tensors lie between a block's forward pass and its backward pass.

On a CPU it is a file without a name in the job's folder, of which nothing is left when the process ends, however it
ends. The system's page cache takes what is written, writes it to the disk while the job computes, and reads ahead when
told to; its pages are not the process's. A full disk is an error that says so, which a mapped file could not give.

On a GPU it is pinned host memory. Copies run on a stream of their own: what one block leaves goes out while the next
one computes, and what a block needs comes in while the one after it is run backward.

`satchel::spill` and `satchel::fetch` move the bytes. Under fake tensors they move none, but a rehearsal counts them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from satchel.core.disk import writing

CALL = 1 << 30  # bytes of one system call; Linux moves less than 2 GiB at once
NOWHERE = -1  # the file of fake tensors

torch.library.define("satchel::spill", "(Tensor[] pieces, int file, int at) -> ()")
torch.library.define("satchel::fetch", "(Tensor(a!)[] pieces, int file, int at) -> ()")


@torch.library.impl("satchel::spill", "default")
def _spill(pieces: list[Tensor], file: int, at: int) -> None:
    for piece in pieces:
        data, done = piece.view(torch.uint8).numpy().data, 0
        while done < len(data):
            done += os.pwrite(file, data[done : done + CALL], at + done)
        at += done


@torch.library.impl("satchel::fetch", "default")
def _fetch(pieces: list[Tensor], file: int, at: int) -> None:
    for piece in pieces:
        data, done = piece.view(torch.uint8).numpy().data, 0
        while done < len(data):
            got = os.preadv(file, [data[done : done + CALL]], at + done)
            if not got:
                raise OSError(f"the file of activations ends at byte {at + done}; was it truncated?")
            done += got
        at += done


@torch.library.register_fake("satchel::spill")
def _spill_nothing(pieces: list[Tensor], file: int, at: int) -> None:
    return None


@torch.library.register_fake("satchel::fetch")
def _fetch_nothing(pieces: list[Tensor], file: int, at: int) -> None:
    return None


@dataclass(eq=False)
class Region:
    """Where the tensors of one block lie. Its room is free again when nobody holds it."""

    nbytes: int
    at: int = 0  # in the file
    host: Tensor | None = None  # pinned, [nbytes]
    staged: Tensor | None = None  # its copy on the device, under way or done
    ready: Any = None  # the event of the last copy


class FileTier:
    """A file in `home`, or in the system's folder for temporary files if that does not exist."""

    def __init__(self, home: Path | None) -> None:
        self.home = home
        self.file: IO[bytes] | None = None
        self.live: WeakSet[Region] = WeakSet()

    def spill(self, pieces: Sequence[Tensor]) -> Region:
        """Write flat tensors behind one another. Raises NoDisk."""
        region = Region(size(pieces), max((r.at + r.nbytes for r in self.live), default=0))
        self.live.add(region)
        with writing(self._folder()):
            torch.ops.satchel.spill(list(pieces), self._descriptor(pieces), region.at)
        return region

    def prefetch(self, region: Region) -> None:
        """Have the system read what `fetch` will ask for next."""
        if self.file is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), region.at, region.nbytes, os.POSIX_FADV_WILLNEED)

    def fetch(self, region: Region, pieces: Sequence[Tensor]) -> None:
        """Read what was spilled into flat tensors of the same sizes."""
        torch.ops.satchel.fetch(list(pieces), self._descriptor(pieces), region.at)

    def _descriptor(self, pieces: Sequence[Tensor]) -> int:
        if is_fake(pieces):
            return NOWHERE
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self._folder(), buffering=0)  # noqa: SIM115 - lives as long as we do
        return self.file.fileno()

    def _folder(self) -> Path:
        return self.home if self.home and self.home.is_dir() else Path(tempfile.gettempdir())


class PinnedTier:
    """Host memory beside a GPU. Tensors that are being copied stay alive until the next block's are."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.held: tuple[Sequence[Tensor], Any] = (), None

    def spill(self, pieces: Sequence[Tensor]) -> Region:
        """Begin to copy flat tensors out."""
        region = Region(size(pieces))
        if is_fake(pieces):
            torch.ops.satchel.spill(list(pieces), NOWHERE, 0)
        else:
            region.host = torch.empty(region.nbytes, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(self._behind()):
                for piece, place in zip(pieces, _places(pieces), strict=True):
                    region.host[place].copy_(piece.view(torch.uint8), non_blocking=True)
                region.ready = torch.cuda.current_stream().record_event()
        self._release()
        self.held = pieces, region.ready
        return region

    def prefetch(self, region: Region) -> None:
        """Begin to copy a region in."""
        self._release()
        region.staged = torch.empty(region.nbytes, dtype=torch.uint8, device="cuda")
        if region.host is not None:
            with torch.cuda.stream(self._behind()):
                region.staged.copy_(region.host, non_blocking=True)
                region.ready = torch.cuda.current_stream().record_event()

    def fetch(self, region: Region, pieces: Sequence[Tensor]) -> None:
        """Wait for a region, and take it apart into flat tensors of the same sizes."""
        if region.staged is None:
            self.prefetch(region)
        assert region.staged is not None
        if region.host is None:
            torch.ops.satchel.fetch([region.staged], NOWHERE, 0)
        else:
            torch.cuda.current_stream().wait_event(region.ready)
        for piece, place in zip(pieces, _places(pieces), strict=True):
            piece.view(torch.uint8).copy_(region.staged[place])
        region.staged = None

    def _behind(self) -> torch.cuda.Stream:
        """The stream of copies, which begins with what the computing stream has been given so far."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        return self.stream

    def _release(self) -> None:
        """Let go of what was copied last: its memory is used again behind the copy."""
        _, copied = self.held
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        self.held = (), None


Tier = FileTier | PinnedTier


def tier_of(device: torch.device, home: Path | None) -> Tier:
    """The second tier beside a device."""
    return PinnedTier() if device.type == "cuda" else FileTier(home)


def size(pieces: Sequence[Tensor]) -> int:
    """Bytes of all pieces."""
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def is_fake(pieces: Sequence[Tensor]) -> bool:
    """Whether the pieces have no data."""
    return bool(pieces) and isinstance(pieces[0], FakeTensor)


def _places(pieces: Sequence[Tensor]) -> list[slice]:
    ends = [size(pieces[: number + 1]) for number in range(len(pieces))]
    return [slice(end - size([piece]), end) for end, piece in zip(ends, pieces, strict=True)]
