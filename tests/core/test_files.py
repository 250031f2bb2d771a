"""Files are written whole or not at all, and nothing but files is replaced."""

import os
import stat

import pytest

from zeropoint.core.errors import FileError
from zeropoint.core.files import write_atomically


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert write_atomically(link, b"new") == link
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_the_mode_of_a_file_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_new_files(tmp_path):
    (tmp_path / "other").touch()
    new = write_atomically(tmp_path / "new", b"")
    assert new.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
def test_what_is_no_file_is_refused_and_left(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    named = path
    if kind == "link to a pipe":
        named = tmp_path / "link"
        named.symlink_to(path)
    before = sorted(tmp_path.iterdir()), path.stat().st_mode
    with pytest.raises(FileError, match=r"no regular file there.*Choose the path of a file"):
        write_atomically(named, b"new")
    assert (sorted(tmp_path.iterdir()), path.stat().st_mode) == before
