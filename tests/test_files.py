"""Files that are written whole or not at all, and what the file system refuses in one sentence."""

import errno
import os
import shutil

import pytest

from hiermpi import files
from hiermpi.errors import UsageError, UserError
from hiermpi.files import file_errors, require_new, sync, whole_path, write_bytes, write_whole

CALLS = ("open", "write", "fsync", "close", "replace", "rename", "chmod", "unlink")
MOST_CALLS = 40
FULL = OSError(errno.ENOSPC, "No space left on device")


def write(path, data=b"new"):
    write_whole(path, lambda descriptor: write_bytes(descriptor, data))


def fail_at(monkeypatch, numbers, names=CALLS, error=FULL):
    """Have the calls of these numbers fail, of all calls of os.NAME; return the list in which the calls are noted."""
    seen = []

    def failing(name, real):
        def call(*arguments, **named):
            seen.append(name)
            if len(seen) in numbers:
                if name == "close":
                    real(*arguments)  # the descriptor is gone even where close fails
                raise error
            return real(*arguments, **named)

        return call

    for name in names:
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return seen


def each_failure(monkeypatch, prepare, act, error=FULL):
    """Prepare, and act while the first OS call fails; then the second, and so on; yield the calls and what was raised.

    The last one is the attempt without a failure, in which nothing is raised.
    """
    for number in range(1, MOST_CALLS):
        prepare()
        raised = None
        with monkeypatch.context() as patched:
            seen = fail_at(patched, [number], error=error)
            try:
                act()
            except BaseException as caught:
                raised = caught
        complete = len(seen) < number
        yield seen if complete else seen[:number], raised
        if complete:
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "file"
    write(path, b"one")
    write(path, b"two" * 1000)
    assert path.read_bytes() == b"two" * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_any_failing_call_leaves_the_old_file(tmp_path, monkeypatch, there, error):
    """Before the renaming the file is the old one, or absent; after it the new one is whole."""
    path, failed = tmp_path / "file", []

    def prepare():
        path.unlink(missing_ok=True)
        if there:
            path.write_bytes(b"old")

    for seen, raised in each_failure(monkeypatch, prepare, lambda: write(path), error):
        replaced = raised is None or "replace" in seen[:-1]
        content = b"new" if replaced else b"old"
        found = [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()]
        assert found == ([("file", content)] if there or replaced else []), seen
        if raised is None:
            continue
        failed.append(seen[-1])
        if error is FULL:
            assert str(raised).startswith(f"cannot write {path}: No space left on device: free some there")
            assert isinstance(raised, UserError)
        else:
            assert raised is error
    # The temporary file, the renaming, and the entry in the folder.
    assert failed == ["unlink", "open", "write", "fsync", "close", "replace", "open", "fsync", "close"]


def test_a_folder_that_cannot_be_flushed_is_told_and_the_file_is_whole(tmp_path, monkeypatch):
    fail_at(monkeypatch, [2], ["fsync"])
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
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some there"), (errno.EACCES, "that you may use"), (errno.ENOENT, "that exists"), (99, "$")],
)
def test_errors_name_the_path_and_what_to_do(tmp_path, number, advice):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: .*{advice}"), file_errors(tmp_path, "read"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), file_errors(tmp_path, "read"):
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


@pytest.fixture(params=[True, False], ids=["folder", "file"])
def content(request, tmp_path):
    """Functions that make the content of a path, and read it; None where the path does not exist."""

    def make(path, text):
        if request.param:
            path.mkdir()
            (path / "part").write_text(text)
        else:
            path.write_text(text)

    def read(path):
        part = path / "part" if request.param else path
        return part.read_text() if part.exists() else None

    return make, read


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_any_failing_call_leaves_the_old_path(tmp_path, monkeypatch, content, there, error):
    """Before the renaming the path is the old one, or absent; after it the old or the new one, whole."""
    make, read = content
    path, failed = tmp_path / "model", []

    def prepare():
        for entry in tmp_path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if there:
            make(path, "old")

    def act():
        with whole_path(path) as temporary:
            make(temporary, "new")

    for seen, raised in each_failure(monkeypatch, prepare, act, error):
        old = "old" if there else None
        if raised is None:
            assert read(path) == "new", seen
        else:
            failed.append(seen[-1])
            renamed = "rename" in seen[:-1]
            assert raised is error or renamed  # a removal that fails may end in another error
            assert read(path) in ((old, "new") if renamed else (old,)), seen
        if raised is not None and seen[-1] in ("chmod", "fsync", "rename"):  # others may be those of the removal
            assert [entry.name for entry in tmp_path.iterdir()] in ([], ["model"]), seen
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert {"chmod", "open", "fsync", "close", "rename"} <= set(failed)


def test_a_folder_that_cannot_be_moved_back_is_kept_aside(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "part").write_text("old")
    with monkeypatch.context() as patched:
        fail_at(patched, [2, 3], ["rename"])
        with pytest.raises(OSError, match="No space left"), whole_path(path) as temporary:
            temporary.mkdir()
            (temporary / "part").write_text("new")
    assert [part.read_text() for part in tmp_path.rglob("part")] == ["old"]


def test_a_body_that_makes_nothing_leaves_the_old_path(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "part").write_text("old")
    with pytest.raises(FileNotFoundError), whole_path(path):
        pass
    assert (path / "part").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_missing_cannot_be_flushed(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
