"""A container is whole or refused: every byte counts, and a right digest proves nothing about the content."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hiermpi.errors import DamagedFile, UserError
from hiermpi.storage import container
from hiermpi.storage.container import USER_BLOCK, build_image, make_header, open_container, verify, write_image

VALUES = np.arange(7, dtype=np.float32)


def fill(file):
    file.create_dataset("a/values", data=VALUES)
    file.attrs["text"] = "hello"
    file.attrs["count"] = 3


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.h5"
    write_image(path, build_image("dataset", fill))
    return path


def read(path):
    with open_container(path, "dataset") as reader:
        return reader.array("a/values", ("float32",), 1), reader.text("text"), reader.integer("count")


def test_round_trip(path):
    values, text, count = read(path)
    assert np.array_equal(values, VALUES)
    assert (text, count) == ("hello", 3)
    assert verify(path).kind == "dataset"
    with h5py.File(path) as file:  # any HDF5 tool can read it
        assert file.attrs["count"] == 3


def test_streamed_and_built_files_hold_the_same(tmp_path, path):
    streamed = tmp_path / "streamed.h5"
    container.write_streamed(streamed, "dataset", fill, 100)
    assert read(streamed)[1:] == read(path)[1:]
    verify(streamed)
    assert streamed.stat().st_size < 10_000  # allocated in advance, given back at the end


def test_large_files_are_read_without_an_image(path, monkeypatch):
    monkeypatch.setattr(container, "IN_MEMORY_LIMIT", 10)
    assert np.array_equal(read(path)[0], VALUES)


def test_every_flipped_byte_is_noticed(path):
    good = path.read_bytes()
    for place in [*range(USER_BLOCK), *range(USER_BLOCK, len(good), 5)]:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises((DamagedFile, UserError)) as caught:
            read(path)
        assert str(path) in str(caught.value)
        with pytest.raises((DamagedFile, UserError)):
            verify(path)


@pytest.mark.parametrize("keep", [0, 1, 100, USER_BLOCK - 1, USER_BLOCK, USER_BLOCK + 1, -1, -200])
def test_truncated_files_are_refused(path, keep):
    good = path.read_bytes()
    path.write_bytes(good[:keep])
    with pytest.raises(DamagedFile, match=r"truncated|not a file of hiermpi"):
        read(path)


def test_longer_newer_and_foreign_files_are_refused(path, tmp_path):
    good = path.read_bytes()
    path.write_bytes(good + b"\0")
    with pytest.raises(DamagedFile, match="longer"):
        read(path)
    path.write_bytes(good[:8] + (2).to_bytes(4, "little") + good[12:])
    with pytest.raises(DamagedFile, match="version 2"):
        read(path)
    path.write_text("just text\n" * 100)
    with pytest.raises(DamagedFile, match="not a file of hiermpi"):
        read(path)
    with h5py.File(path, "w") as file:
        fill(file)
    with pytest.raises(DamagedFile, match="not a file of hiermpi"):
        read(path)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.h5")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    write_image(path, build_image("checkpoint", fill))
    with pytest.raises(DamagedFile, match="is a checkpoint, not a dataset"):
        read(path)


def test_garbage_with_a_right_digest_is_refused(path):
    import hashlib

    body = os.urandom(3000)
    path.write_bytes(make_header("dataset", len(body), hashlib.sha256(body).digest()) + body)
    with pytest.raises(DamagedFile, match="not valid HDF5"):
        read(path)


def external_storage(file):
    file.create_dataset("a/values", (7,), "f4", external=[("/etc/passwd", 0, 28)])


def virtual(file):
    layout = h5py.VirtualLayout((7,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (7,))
    file.create_virtual_dataset("a/values", layout)


def soft_link(file):
    file["b"] = VALUES
    file["a/values"] = h5py.SoftLink("/b")


def external_link(file):
    file["a/values"] = h5py.ExternalLink("/etc/other.h5", "x")


def enormous(file):
    file.create_dataset("a/values", (1 << 40,), "f4", chunks=(1 << 20,))


def filtered(file):
    file.create_dataset("a/values", data=np.zeros(1 << 20, np.float32), compression="gzip")


def variable_length(file):
    file.create_dataset("a/values", (7,), h5py.string_dtype())


def wrong_type(file):
    file["a/values"] = VALUES.astype(np.float64)


def wrong_rank(file):
    file["a/values"] = VALUES[None]


def wrong_byte_order(file):
    file["a/values"] = VALUES.astype(">f4")


def enormous_chunk(file):
    file.create_dataset("a/values", (7,), "f4", chunks=(1 << 28,), maxshape=(None,))


def no_shape(file):
    file["a/values"] = h5py.Empty("f4")


def a_group(file):
    file.create_group("a/values")


@pytest.mark.parametrize(
    "trick",
    [
        external_storage,
        virtual,
        soft_link,
        external_link,
        enormous,
        filtered,
        variable_length,
        wrong_type,
        wrong_rank,
        wrong_byte_order,
        enormous_chunk,
        no_shape,
        a_group,
    ],
)
def test_content_that_hiermpi_does_not_write_is_refused(path, trick):
    write_image(path, build_image("dataset", trick))
    verify(path)  # whole, but not trusted
    with open_container(path, "dataset") as reader, pytest.raises(DamagedFile) as caught:
        reader.array("a/values", ("float32",), 1)
    assert str(path) in str(caught.value)


def test_one_stored_value_cannot_be_asked_for_again_and_again(path):
    """Hard links to one dataset cost nothing in the file, and would cost its size each in memory."""

    def fill(file):
        file["a/0"] = np.zeros(1000, np.float32)
        for index in range(1, 100):
            file[f"a/{index}"] = file["a/0"]

    write_image(path, build_image("dataset", fill))
    with open_container(path, "dataset") as reader, pytest.raises(DamagedFile, match="larger than the file"):
        for name in reader.names("a"):
            reader.array(f"a/{name}", ("float32",), 1)


def test_unprintable_names_are_refused(path):
    write_image(path, build_image("dataset", lambda file: file.create_dataset("a/x\x1b[2J", data=VALUES)))
    with open_container(path, "dataset") as reader, pytest.raises(DamagedFile, match="entry with the name"):
        reader.names("a")


def test_hdf5_that_is_broken_inside_is_refused(path):
    """A right digest over broken structures: whatever HDF5 raises, one sentence comes out, and it never crashes."""
    import hashlib

    good = path.read_bytes()
    rng = np.random.default_rng(5)
    for _ in range(300):
        body = bytearray(good[USER_BLOCK:])
        for place in rng.integers(0, len(body), 3):
            body[place] = rng.integers(256)
        path.write_bytes(make_header("dataset", len(body), hashlib.sha256(body).digest()) + bytes(body))
        with contextlib.suppress(DamagedFile):
            read(path)


def test_pipes_and_devices_are_refused_without_opening_them(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for special in (pipe, Path("/dev/zero")):
        for ask in (read, verify):
            with pytest.raises(UserError, match="is not a regular file"):
                ask(special)


def test_a_disk_that_cannot_read_is_damage(path, monkeypatch):
    """So that the checkpoint before it is tried."""

    def failing(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(container, "read_header", failing)
    for ask in (read, verify):
        with pytest.raises(DamagedFile, match="Input/output error"):
            ask(path)


def test_attributes_are_checked(path):
    def odd(file):
        file.attrs["text"] = [1, 2, 3]
        file.attrs["count"] = -1

    write_image(path, build_image("dataset", odd))
    with open_container(path, "dataset") as reader:
        for ask, name in ((reader.text, "text"), (reader.integer, "count"), (reader.number, "none")):
            with pytest.raises(DamagedFile, match=name):
                ask(name)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_at_any_call_leaves_the_old_file(path, monkeypatch, call, streamed):
    before = path.read_bytes()
    real, calls = getattr(os, call), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises((UserError, OSError), match="No space left"):
        if streamed:
            container.write_streamed(path, "dataset", fill, 100)
        else:
            write_image(path, build_image("dataset", fill))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_one_sentence(tmp_path):
    """In a child whose files may not grow beyond a limit: HDF5 itself would crash there."""
    script = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from hiermpi.storage.container import write_streamed\n"
        "from hiermpi.errors import UserError\n"
        "try:\n"
        "    fill = lambda file: file.create_dataset('x', data=np.zeros(1 << 20))\n"
        "    write_streamed(Path(sys.argv[1]), 'dataset', fill, int(sys.argv[2]))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    for size_hint in (8 << 20, 0):  # found when the space is allocated, or only in the middle of HDF5's writing
        words = [sys.executable, "-c", script, str(tmp_path / "out.h5"), str(size_hint)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        assert "File too large" in result.stdout
        assert not list(tmp_path.iterdir())
