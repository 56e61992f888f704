"""Files that are on the disk when a call returns, and that are replaced whole or not at all."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_pieces(
    path: Path, pieces: Iterable[bytes | memoryview], see: Callable[[bytes | memoryview], None] = lambda piece: None
) -> None:
    """Write a file from its bytes, all of which `see` is shown, and wait until the disk has it."""
    with path.open("wb") as file:
        for piece in pieces:
            see(piece)
            file.write(piece)
            del piece  # so that it is gone when the next one is made
        file.flush()
        os.fsync(file.fileno())


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
