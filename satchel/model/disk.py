"""Files that are on the disk when a call returns, and that are replaced whole or not at all."""

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

# U bytes, in uint8

UNCACHED = getattr(os, "O_DIRECT", 0)
BUFFER = 2 << 20  # bytes written at once: whole blocks of any disk


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_pieces(
    path: Path, pieces: Iterable[bytes | memoryview], see: Callable[[bytes | memoryview], None] = lambda piece: None
) -> None:
    """Write a file from its bytes, all of which `see` is shown, and wait until the disk has it.

    Past the system's cache of files where that can be: nobody reads it soon, and the pages that it would take there are
    what others have read; to make fresh ones takes a processor longer than all else that writing does.
    """
    handle = _open_uncached(path)
    try:
        with ThreadPoolExecutor(1) as writer:  # the disk has a block while the next one is seen and filled
            under_way: Future[None] | None = None
            for block_U in _blocks(pieces, see):
                if under_way:
                    under_way.result()
                under_way = writer.submit(_write, handle, block_U)
            if under_way:
                under_way.result()
        os.fsync(handle)
    finally:
        os.close(handle)


def _blocks(pieces: Iterable[bytes | memoryview], see: Callable[[bytes | memoryview], None]) -> Iterator[np.ndarray]:
    """The pieces' bytes in blocks of BUFFER, the last one shorter; each is valid until the one after the next."""
    filling, other = (np.frombuffer(mmap.mmap(-1, BUFFER), dtype=np.uint8) for _ in range(2))
    held = 0
    for piece in pieces:
        see(piece)
        rest_U = np.frombuffer(piece, dtype=np.uint8)
        while len(rest_U):
            count = min(len(rest_U), BUFFER - held)
            np.copyto(filling[held : held + count], rest_U[:count])
            rest_U, held = rest_U[count:], held + count
            if held == BUFFER:
                yield filling
                filling, other, held = other, filling, 0
        del piece, rest_U  # so that they are gone when the next one is made
    yield filling[:held]


def _open_uncached(path: Path) -> int:
    """A new file to write to, past the cache where system and file system know such a way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | UNCACHED, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write(handle: int, bytes_U: np.ndarray) -> None:
    """Write all of the bytes; the last ones of a file, no whole block, through the cache."""
    while len(bytes_U):
        try:
            bytes_U = bytes_U[os.write(handle, bytes_U.data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _through_cache(handle):
                raise


def _through_cache(handle: int) -> bool:
    """Write a file through the cache from now on; whether that is a change."""
    if not UNCACHED:
        return False
    import fcntl  # of the systems that have the flag

    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~UNCACHED)
    return bool(flags & UNCACHED)


def replace_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new, whenever the machine stops."""
    draft = path.with_name(f".{path.name}.part")
    try:
        write_text(draft, text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
