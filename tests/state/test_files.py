"""Files that are there in full or as they were."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from graft.errors import ResourceError
from graft.state.files import FULL, disk_errors, sync_file, sync_folder, write_atomically


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "config.toml"
    write_atomically(path, "α = 1\n")
    assert path.read_bytes() == "α = 1\n".encode()
    write_atomically(path, "")
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_has_the_old_file_open_reads_it_to_its_end(tmp_path):
    path = tmp_path / "report.html"
    write_atomically(path, "old" * 100_000)
    with path.open() as reader:
        assert reader.read(3) == "old"
        write_atomically(path, "new")
        assert reader.read() == "old" * 99_999
    assert path.read_text() == "new"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("graft.state.files.os.fsync", fail)
    with pytest.raises(ResourceError, match=r"state\.json could not be written \(No space left on device\)"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", FULL, ids=errno.errorcode.get)
def test_a_full_disk_is_named_and_says_what_to_do(code):
    says = r"disk is full: step-000007 .*graft resume.*keep_last"
    with pytest.raises(ResourceError, match=says) as caught, disk_errors("step-000007"):
        raise OSError(code, "the system's words")
    assert "the system's words" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_what_else_the_system_refuses_has_its_reason_and_what_to_do(code):
    says = r"^step-000007 could not be written: the system's words\. .*graft resume"
    with pytest.raises(ResourceError, match=says) as caught, disk_errors("step-000007"):
        raise OSError(code, "the system's words")
    assert "full" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_what_is_no_matter_of_the_system_passes():
    with pytest.raises(ZeroDivisionError), disk_errors("x"):
        raise ZeroDivisionError
    with disk_errors("x"):
        pass


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere/a.txt", "No such file or directory"), ("file/a.txt", "Not a directory")]
)
def test_a_folder_that_is_not_there(tmp_path, name, reason):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=f"{name} could not be written: {reason}"):
        write_atomically(tmp_path / name, "text")


def test_syncing_changes_nothing(tmp_path):
    path: Path = tmp_path / "a.txt"
    path.write_text("text")
    sync_file(path)
    sync_folder(tmp_path)
    assert path.read_text() == "text"
