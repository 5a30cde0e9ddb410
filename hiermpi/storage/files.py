"""Files that are whole or absent, and errors of the file system in one sentence."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hiermpi.errors import UserError

TEMPORARY_SUFFIX = ".writing"


@contextlib.contextmanager
def told(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the body into a UserError that names ``path``, what was being done, and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {doing} {path}: {error.strerror or error}") from None


def write_whole(path: Path, write: Callable[[int], None]) -> None:
    """Make the file ``path`` with what ``write`` writes to a descriptor; any failure leaves the old one as it was.

    A temporary file in the same folder, fsync, rename, fsync of the folder. Raises UserError.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with told(path, "write"):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                write(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_bytes(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Have the folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
