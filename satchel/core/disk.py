"""What a disk refuses, as one error: the folder, why, the way out, and what is kept."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from satchel.core.errors import NoDisk
from satchel.core.units import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, a limit on the size of a file
WAY_OUT = "free some or choose another folder"


@contextmanager
def writing(folder: Path, kept: str = "") -> Generator[None, None, None]:
    """Raises NoDisk in place of an OSError of the block; `kept` is what the user still has."""
    try:
        yield
    except OSError as error:
        why = "no disk left" if error.errno in FULL else f"cannot be written ({error.strerror or error})"
        raise NoDisk(f"{folder}: {why}; {WAY_OUT}{kept}") from error


def require_room(folder: Path, nbytes: int, kept: str = "") -> None:
    """Raises NoDisk if the disk that `folder` lies on, or will lie on, has less than `nbytes` free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise NoDisk(
            f"{folder}: no disk left: needs {format_bytes(nbytes)}, {format_bytes(free)} free; {WAY_OUT}{kept}"
        )
