import errno
import fcntl
import os
import random
import weakref

import pytest

from satchel.model import disk


@pytest.fixture
def calls(monkeypatch):
    """What the disk is asked for, in order: the name of the call and of the file."""
    seen, replace, fsync = [], os.replace, os.fsync

    def name(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(("fsync", name(handle))) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(("replace", b.name)) or replace(a, b))
    return seen


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's table of open files")
def test_a_text_is_on_the_disk_before_it_takes_its_place_and_the_folder_after(tmp_path, calls):
    path = tmp_path / "run.json"
    disk.replace_text(path, "old")
    disk.replace_text(path, "new ∂")
    assert calls[3:] == [("fsync", ".run.json.part"), ("replace", "run.json"), ("fsync", tmp_path.name)]
    assert path.read_text(encoding="utf-8") == "new ∂" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    disk.replace_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.replace_text(path, "new")
    assert path.read_text() == "old"


BLOCK = 4096
SIZES = [0, 1, BLOCK, disk.BUFFER - 1, disk.BUFFER, disk.BUFFER + 1, 2 * disk.BUFFER + 3 * BLOCK + 5]


def pieces(size, chance):
    """The bytes of a file in pieces of any size, some of them empty."""
    whole, at = chance.randbytes(size), 0
    while at < size:
        count = chance.choice((0, 1, 7, BLOCK, chance.randint(1, size)))
        yield memoryview(whole)[at : at + count]
        at += count


@pytest.fixture(params=["as the system can", "no such file system", "no such write", "no such system"])
def way(request, monkeypatch):
    """Files past the cache, and whatever may stand against them."""
    real_open, real_write = os.open, os.write

    def refuse_open(path, flags, mode=0o777):
        if flags & disk.UNCACHED:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def refuse_write(handle, data):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & disk.UNCACHED:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(handle, data)

    match request.param:
        case "no such file system":
            monkeypatch.setattr(os, "open", refuse_open)
        case "no such write":
            monkeypatch.setattr(os, "write", refuse_write)
        case "no such system":
            monkeypatch.setattr(disk, "UNCACHED", 0)


@pytest.mark.parametrize("size", SIZES)
def test_pieces_become_the_file_that_was_seen_whatever_the_disk_can_do(tmp_path, way, size):
    seen, path = [], tmp_path / "file"
    path.write_bytes(b"longer" * BLOCK)
    disk.write_pieces(path, pieces(size, random.Random(size)), lambda piece: seen.append(bytes(piece)))
    whole = random.Random(size).randbytes(size)
    assert path.read_bytes() == b"".join(seen) == whole


def test_a_piece_is_gone_before_the_next_one_is_made(tmp_path):
    class Piece(bytearray):
        """Can be referred to weakly."""

    def made():
        first = Piece(10)
        gone = weakref.ref(first)
        yield first
        del first
        assert gone() is None
        yield Piece(10)

    disk.write_pieces(tmp_path / "file", made())


def test_a_disk_that_is_full_is_told_as_it_is(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write_pieces(tmp_path / "file", [b"abc"])
