"""The container of datasets and checkpoints: an HDF5 file behind a 512-byte user block with its digest.

The user block holds a magic, the format version, the kind of content, and the length and SHA-256 of everything
behind it, then zeros. It is checked before HDF5 sees the file, so any flipped byte is noticed. A digest only proves
that a file is what its writer made, so readers also go by an allow-list and refuse what they do not expect.
"""

import contextlib
import errno
import hashlib
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.errors import DamagedFile, UserError
from hiermpi.files import file_errors, write_bytes, write_whole

import h5py  # isort: skip  (hiermpi.storage must close the plugin path first)

MAGIC = b"hiermpi\0"
VERSION = 1
USER_BLOCK = 512
HEADER = struct.Struct("<8sI16sQ32s")
IN_MEMORY_LIMIT = 1 << 30
"""The largest container, in bytes, that is built and read in memory."""
BLOCK = 1 << 24
LIBVER = ("v110", "v110")
LARGEST_ATTRIBUTE = 64 << 20

Fill = Callable[[h5py.File], None]


class Header(NamedTuple):
    """The fields of a user block."""

    version: int
    kind: str
    length: int
    sha256: bytes


def make_header(kind: str, length: int, sha256: bytes) -> bytes:
    """Make the 512 bytes of a user block.

    Args:
        kind: The kind of content.
        length: The number of bytes behind the user block.
        sha256: The SHA-256 of these bytes.
    """
    return HEADER.pack(MAGIC, VERSION, kind.encode(), length, sha256).ljust(USER_BLOCK, b"\0")


def build_image(kind: str, fill: Fill) -> memoryview:
    """Build a container in memory, where no file system error can reach HDF5."""
    with h5py.File(
        "image", "w", driver="core", backing_store=False, libver=LIBVER, userblock_size=USER_BLOCK
    ) as file:
        fill(file)
        file.flush()
        body = file.id.get_file_image()
    return memoryview(make_header(kind, len(body), hashlib.sha256(body).digest()) + body)


def write_image(path: Path, image: memoryview | bytes) -> None:
    """Write a built container; the file is whole or it is not made. Raises UserError."""
    write_whole(path, lambda descriptor: write_bytes(descriptor, image))


def write_streamed(path: Path, kind: str, fill: Fill, size_hint: int) -> None:
    """Write a container of any size in bounded memory; the file is whole or it is not made. Raises UserError.

    The space is allocated first, so that a full disk is an error then and not a crash inside HDF5 later.

    Args:
        path: The file to make.
        kind: The kind of content.
        fill: The function that writes the content.
        size_hint: The size of the content's data in bytes.
    """

    def write(descriptor: int) -> None:
        os.posix_fallocate(descriptor, 0, USER_BLOCK + size_hint + size_hint // 64 + (1 << 20))
        with open(descriptor, "r+b", buffering=0, closefd=False) as raw:
            allocated = AllocatedFile(raw)
            with h5py.File(allocated, "w", libver=LIBVER, userblock_size=USER_BLOCK) as file:
                fill(file)
            allocated.require_written()
            os.ftruncate(descriptor, allocated.length)
            length = allocated.length - USER_BLOCK
            digest = _digest_of(raw, length)
            raw.seek(0)
            write_bytes(descriptor, make_header(kind, length, digest))

    write_whole(path, write)


class AllocatedFile:
    """A file whose space is allocated beforehand, and which HDF5 sees only as long as what was written to it.

    HDF5 crashes where a write fails at the wrong moment, so every write reports success to it; :meth:`require_written`
    raises the first error afterwards.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self.raw = raw
        self.length = 0
        self._error: OSError | None = None

    def require_written(self) -> None:
        """Raise the OSError of the first write that failed, if one did."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.raw.seek(self.length + offset) if whence == os.SEEK_END else self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def read(self, size: int) -> bytes:
        return self.raw.read(size) or b""

    def readinto(self, buffer: memoryview) -> int:
        return self.raw.readinto(buffer) or 0

    def write(self, data: memoryview) -> int:
        start = self.raw.tell()
        if self._error is None:
            try:
                write_bytes(self.raw.fileno(), data)
            except OSError as error:
                self._error = error
        self.length = max(self.length, self.raw.seek(start + len(data)))
        return len(data)

    def truncate(self, size: int) -> int:
        self.length = size
        return size

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def open_container(path: Path, kind: str) -> "Iterator[Reader]":
    """Open a reader of the container at ``path``, after a check of all its bytes. Raises UserError, DamagedFile."""
    with contextlib.ExitStack() as stack:
        with reading(path):
            raw = stack.enter_context(open_file(path))
            header = read_header(raw, path)
            if header.kind != kind:
                raise DamagedFile(f"{path} is a {header.kind}, not a {kind}: name a {kind}")
            file = _open_checked(raw, header, path)
        stack.callback(_close, file)
        yield Reader(file, path, header.sha256.hex())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a UserError, or into a DamagedFile where the disk cannot read its sectors."""
    with file_errors(path, "read"):
        try:
            yield
        except OSError as error:
            if error.errno == errno.EIO:
                raise DamagedFile(f"{path} is damaged: {error.strerror}: take another copy") from None
            raise


def open_file(path: Path) -> io.FileIO:
    """Open a regular file for reading. Raises UserError, OSError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise UserError(f"{path} is not a regular file: name a file")
    return open(path, "rb", buffering=0)


def read_header(raw: io.FileIO, path: Path) -> Header:
    """Read the user block of an open file and check it against the file's length. Raises DamagedFile."""
    block = raw.read(USER_BLOCK) or b""
    if not block.startswith(MAGIC):
        raise DamagedFile(f"{path} is not a file of hiermpi: make datasets with hiermpi prepare")
    if len(block) < USER_BLOCK:
        raise DamagedFile(f"{path} is truncated: make it again or take another copy")
    _, version, kind, length, sha256 = HEADER.unpack_from(block)
    if version > VERSION:
        raise DamagedFile(f"{path} has format version {version}, this hiermpi reads up to {VERSION}: update hiermpi")
    known = kind.rstrip(b"\0")
    if block != make_header(known.decode("latin-1"), length, sha256) or known not in (b"dataset", b"checkpoint"):
        raise DamagedFile(f"{path} is damaged in its first {USER_BLOCK} bytes: make it again or take another copy")
    actual = os.fstat(raw.fileno()).st_size - USER_BLOCK
    if actual != length:
        fault = "truncated" if actual < length else "longer than it says"
        raise DamagedFile(
            f"{path} is {fault} ({actual + USER_BLOCK:,} bytes, expected {length + USER_BLOCK:,}): "
            "make it again or take another copy"
        )
    return Header(version, known.decode(), length, sha256)


def verify(path: Path) -> Header:
    """Check all bytes of a container against its digest, and return its header. Raises UserError, DamagedFile."""
    with reading(path), open_file(path) as raw:
        header = read_header(raw, path)
        _require_digest(_digest_of(raw, header.length), header, path)
    return header


def kind_of(path: Path) -> str:
    """Return the kind of content that a container's header states. Raises UserError, DamagedFile."""
    with reading(path), open_file(path) as raw:
        return read_header(raw, path).kind


def _open_checked(raw: io.FileIO, header: Header, path: Path) -> h5py.File:
    source: io.BytesIO | io.FileIO = raw
    if header.length <= IN_MEMORY_LIMIT:
        # The file is read once, so that the bytes that were checked are the bytes that are opened.
        source = image = _image_of(raw, USER_BLOCK + header.length)
        with image.getbuffer() as view:
            _require_digest(hashlib.sha256(view[USER_BLOCK:]).digest(), header, path)
    else:
        _require_digest(_digest_of(raw, header.length), header, path)
    try:
        return h5py.File(source, "r")
    except Exception:  # noqa: BLE001  (HDF5 may raise anything over a malformed file)
        raise DamagedFile(f"{path} is not valid HDF5 behind its user block: make it again") from None


def _close(file: h5py.File) -> None:
    with contextlib.suppress(Exception):  # a malformed file may not even close; nothing was written to it
        file.close()


def _image_of(raw: io.FileIO, size: int) -> io.BytesIO:
    """Return the first ``size`` bytes of a file, with zeros where it has become shorter."""
    image = io.BytesIO()
    image.seek(size - 1)
    image.write(b"\0")
    raw.seek(0)
    with image.getbuffer() as view:
        filled = 0
        while filled < size and (count := raw.readinto(view[filled:])):
            filled += count
    return image


def _digest_of(raw: io.FileIO, length: int) -> bytes:
    digest = hashlib.sha256()
    raw.seek(USER_BLOCK)
    block = memoryview(bytearray(BLOCK))
    while length > 0:
        count = raw.readinto(block[: min(BLOCK, length)]) or 0
        if not count:
            break
        digest.update(block[:count])
        length -= count
    return digest.digest()


def _require_digest(found: bytes, header: Header, path: Path) -> None:
    if found != header.sha256:
        raise DamagedFile(f"{path} is damaged: its content does not match its SHA-256: make it again or take a copy")


class Reader:
    """A reader that returns what is expected from an open container, and refuses the rest. Raises DamagedFile.

    Whatever HDF5 raises over a malformed file becomes a refusal. All datasets together may not be larger than the file,
    so that no file makes its reader allocate more than its own size.

    Args:
        file: The open HDF5 file.
        path: The path of the file, for messages.
        sha256: The hex digest of the content, which identifies it.
    """

    def __init__(self, file: h5py.File, path: Path, sha256: str) -> None:
        self.file = file
        self.path = path
        self.sha256 = sha256
        self._left = file.id.get_filesize()

    def refuse(self, what: str) -> DamagedFile:
        """Make the error that says ``what`` is wrong with the content."""
        return DamagedFile(f"{self.path}: {what}: make it again")

    def names(self, group: str) -> list[str]:
        """Return the names in ``group``, all of which must be hard links."""
        with self._asking(f"/{group}"):
            node = self._node(group)
            if not isinstance(node, h5py.Group):
                raise self.refuse(f"/{group} is not a group")
            names = list(node)
            for name in names:
                if not name.isprintable():
                    raise self.refuse(f"/{group} has an entry with the name {name!r}")
                self._require_hard_link(node, name, f"{group}/{name}")
            return names

    def has(self, name: str) -> bool:
        """Return whether the root has an entry of this name."""
        with self._asking(f"/{name}"):
            return name in self.file

    def dataset(self, name: str, dtypes: tuple[str, ...], ndim: int | None = None) -> h5py.Dataset:
        """Return a dataset that holds plain numbers, is stored in this very file and has no filters.

        Args:
            name: The name of the dataset.
            dtypes: The names of the allowed types.
            ndim: The number of dimensions that it must have; None allows any.
        """
        with self._asking(f"/{name}"):
            node = self._node(name)
            if not isinstance(node, h5py.Dataset):
                raise self.refuse(f"/{name} is not a dataset")
            plan = node.id.get_create_plist()
            layouts = (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED, h5py.h5d.COMPACT)
            if plan.get_layout() not in layouts or plan.get_external_count() or plan.get_nfilters():
                raise self.refuse(f"/{name} is stored in a way that hiermpi does not write")
            stored = node.id.get_type()
            if not any(stored.equal(h5py.h5t.py_create(np.dtype(dtype))) for dtype in dtypes):
                raise self.refuse(f"/{name} holds {stored.dtype}, expected {' or '.join(dtypes)}")
            if node.shape is None or (ndim is not None and node.ndim != ndim):
                raise self.refuse(f"/{name} has the shape {node.shape}")
            self._spend(name, math.prod(node.shape), math.prod(node.chunks or (0,)), stored.get_size())
            return node

    def block(self, node: h5py.Dataset, start: int, stop: int) -> NDArray[Any]:
        """Read the entries from ``start`` up to ``stop`` of a dataset.

        Args:
            node: A dataset that :meth:`dataset` returned.
            start: The index of the first entry.
            stop: The index behind the last entry.
        """
        with self._asking(node.name):
            return node[start:stop]

    def array(self, name: str, dtypes: tuple[str, ...], ndim: int | None = None) -> NDArray[Any]:
        """Read a whole dataset into an array.

        Args:
            name: The name of the dataset.
            dtypes: The names of the allowed types.
            ndim: The number of dimensions that it must have; None allows any.
        """
        node = self.dataset(name, dtypes, ndim)
        with self._asking(f"/{name}"):
            values = np.empty(node.shape, node.dtype)
            if values.size:
                node.read_direct(values)
            return values

    def text(self, name: str) -> str:
        """Return a text attribute of the root."""
        value = self._attribute(name)
        if not isinstance(value, str):
            raise self.refuse(f"the attribute {name} is not a text")
        return value

    def integer(self, name: str) -> int:
        """Return an integer attribute of the root, which must be at least 0."""
        value = self._attribute(name)
        if not isinstance(value, np.integer | int) or value < 0:
            raise self.refuse(f"the attribute {name} is not a count")
        return int(value)

    def number(self, name: str) -> float:
        """Return a numeric attribute of the root."""
        value = self._attribute(name)
        if not isinstance(value, np.floating | np.integer | float | int):
            raise self.refuse(f"the attribute {name} is not a number")
        return float(value)

    def _attribute(self, name: str) -> Any:
        with self._asking(f"the attribute {name}"):
            if name not in self.file.attrs:
                raise self.refuse(f"the attribute {name} is missing")
            entry = self.file.attrs.get_id(name)
            kinds = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT)
            if entry.shape != () or entry.get_type().get_class() not in kinds:
                raise self.refuse(f"the attribute {name} has an unexpected type")
            if entry.get_storage_size() > LARGEST_ATTRIBUTE:
                raise self.refuse(f"the attribute {name} is too large")
            return self.file.attrs[name]

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (DamagedFile, MemoryError):
            raise
        except Exception:  # noqa: BLE001  (h5py raises KeyError, RuntimeError, OSError, ValueError, ...)
            raise self.refuse(f"{what} cannot be read") from None

    def _spend(self, name: str, n_values: int, chunk: int, value_bytes: int) -> None:
        if max(n_values, chunk) * value_bytes > self._left:
            raise self.refuse(f"/{name} says that it is larger than the file has room for")
        self._left -= n_values * value_bytes

    def _node(self, name: str) -> h5py.Group | h5py.Dataset:
        node: Any = self.file
        for part in filter(None, name.split("/")):
            if not isinstance(node, h5py.Group) or part not in node:
                raise self.refuse(f"/{name} is missing")
            self._require_hard_link(node, part, name)
            node = node[part]
        return node

    def _require_hard_link(self, group: h5py.Group, name: str, shown: str) -> None:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise self.refuse(f"/{shown} is a link to elsewhere")
