"""Files that are written whole or not at all, and what the file system refuses in one sentence."""

import errno
import os

import pytest

from hiermpi import files
from hiermpi.errors import UsageError, UserError
from hiermpi.files import require_new, sync, told, whole_path, write_bytes, write_whole

CALLS = ("open", "write", "fsync", "close", "replace")


def write(path, data=b"new"):
    write_whole(path, lambda descriptor: write_bytes(descriptor, data))


def fail_at(monkeypatch, name, number):
    """Have the ``number``-th call of os.NAME fail with a full disk; count all calls."""
    real, seen = getattr(os, name), []

    def call(*arguments, **named):
        seen.append(arguments)
        if len(seen) == number:
            if name == "close":
                real(*arguments)  # the descriptor is gone even where close fails
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(files.os, name, call)
    return seen


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "file"
    write(path, b"one")
    write(path, b"two" * 1000)
    assert path.read_bytes() == b"two" * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("there", [True, False])
def test_any_failing_call_leaves_the_old_file(tmp_path, monkeypatch, name, there):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    seen = fail_at(monkeypatch, name, 1)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device: free some there"):
        write(path)
    monkeypatch.undo()
    assert len(seen) >= 1
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == ([("file", b"old")] if there else [])


def test_a_folder_that_cannot_be_flushed_is_told_and_the_file_is_whole(tmp_path, monkeypatch):
    fail_at(monkeypatch, "fsync", 2)
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_exception_of_the_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(descriptor):
        write_bytes(descriptor, b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]


def test_what_an_earlier_attempt_left_is_no_obstacle(tmp_path):
    (tmp_path / f"file{files.TEMPORARY_SUFFIX}").write_bytes(b"half")
    write(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some there"), (errno.EACCES, "that you may use"), (errno.ENOENT, "that exists"), (99, "$")],
)
def test_errors_name_the_path_and_what_to_do(tmp_path, number, advice):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: .*{advice}"), told(tmp_path, "read"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), told(tmp_path, "read"):
        raise ZeroDivisionError


def test_a_new_output_file(tmp_path):
    require_new(tmp_path / "new", force=False)
    (tmp_path / "old").touch()
    require_new(tmp_path / "old", force=True)
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "old", "--force"), (tmp_path / "no" / "x", "make it")):
        with pytest.raises(UsageError, match=words):
            require_new(path, force=False)


@pytest.mark.parametrize("folder", [True, False])
def test_a_path_is_replaced_as_a_whole(tmp_path, folder):
    path = tmp_path / "model"

    def make(content):
        with whole_path(path) as temporary:
            if folder:
                temporary.mkdir()
                (temporary / "part").write_text(content)
            else:
                temporary.write_text(content)

    def found():
        return ((path / "part") if folder else path).read_text()

    make("one")
    make("two")
    assert found() == "two"
    with pytest.raises(ZeroDivisionError), whole_path(path) as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    assert found() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_renamed_keeps_the_old_one(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "part").write_text("old")
    with pytest.raises(OSError, match="No such file"), whole_path(path):
        pass  # the body has made nothing
    assert (path / "part").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_missing_cannot_be_flushed(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
