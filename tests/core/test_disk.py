"""What a disk refuses becomes one error with the way out; other errors stay what they are."""

import errno
from pathlib import Path

import pytest

from satchel.core.disk import require_room, writing
from satchel.core.errors import NoDisk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_the_users_to_mend(number):
    told = r"out: no disk left; free some or choose another folder; kept: x"
    with pytest.raises(NoDisk, match=told) as caught, writing(Path("out"), "; kept: x"):
        raise OSError(number, "full")
    assert caught.value.exit_code == 2


def test_a_folder_without_permission_says_so():
    with pytest.raises(NoDisk, match="cannot be written \\(Permission denied\\)"), writing(Path("out")):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_other_errors_pass():
    with pytest.raises(ValueError), writing(Path("out")):
        raise ValueError


def test_room_is_looked_for_where_the_folder_will_be(tmp_path):
    require_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(NoDisk, match="needs 1024 TiB, .* free"):
        require_room(tmp_path / "not" / "yet", 1 << 50)
