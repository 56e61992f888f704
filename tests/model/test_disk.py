import os

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
