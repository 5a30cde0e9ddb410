"""The module writes files whole or not at all, and states errors of the file system in one sentence."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hiermpi.errors import UsageError, UserError

TEMPORARY_SUFFIX = ".writing"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": free some there, or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ": name a place that you may use"),
    errno.ENOENT: ": name one that exists",
}


@contextlib.contextmanager
def file_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the body into a UserError that names ``path``, the action ``doing``, and the reason."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "")
        raise UserError(f"cannot {doing} {path}: {error.strerror or error}{advice}") from None


def require_new(path: Path, force: bool) -> None:
    """Refuse an output file that cannot be made or exists already. Raises UsageError."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file with --out")
    if path.exists() and not force:
        raise UsageError(f"{path} exists: name another --out, or add --force to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder: make it first, or name another --out")


def write_whole(path: Path, write: Callable[[int], None]) -> None:
    """Make the file ``path`` with what ``write`` writes to a descriptor; after any failure the old file is unchanged.

    The function writes a temporary file in the same folder, calls fsync, renames it, and calls fsync for the folder.
    Raises UserError.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with file_errors(path, "write"):
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
        sync(path.parent)


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename the file or folder that the body makes there to ``path``.

    After any failure the old file or folder is unchanged. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}-{os.getpid()}")
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for made in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            made.chmod((0o777 if made.is_dir() else 0o666) & ~umask)  # some libraries write for the owner only
            sync(made)
        try:
            if path.is_dir() and any(path.iterdir()):
                path.rename(aside)
            temporary.rename(path)
        except BaseException:  # an interrupt, too, may come between the two
            if aside.exists() and not path.exists():
                aside.rename(path)
            raise
        sync(path.parent)
    finally:
        for leftover in (temporary, aside) if path.exists() else (temporary,):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def write_bytes(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to a descriptor."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
