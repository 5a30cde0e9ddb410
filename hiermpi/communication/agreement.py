"""This module shares errors and small Python objects between ranks, and ends collective commands.

An error of one rank is raised on all, so that no rank waits in a collective that another never enters. Arrays are never
sent as objects. All waits sleep.

Every collective command ends with :func:`leave`: the first rank that exits non-zero makes the launcher kill the others,
so an early ``sys.exit`` would lose the others' work. Ranks meet, finalize, and only then exit.
"""

import contextlib
import logging
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.waiting import Waiter
from hiermpi.errors import EXIT_ERROR, UserError

NOTE_BYTES = 4096
"""The most bytes of a pickled error that is sent to the other ranks."""
PATIENCE_SECONDS = 5.0
"""The seconds for which a rank with an error waits for the others before it logs the error."""

logger = logging.getLogger("hiermpi")
T = TypeVar("T")


@contextmanager
def agreed(comm: MPI.Comm, waiter: Waiter) -> Iterator[None]:
    """Run the body, and raise on every rank of ``comm`` if it raised on any; this is collective over ``comm``.

    The body must not call anything that is collective. :func:`agree` describes what is raised.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
        error = caught
    agree(comm, error, waiter)


def from_root(comm: MPI.Comm, make: Callable[[], T], waiter: Waiter) -> T:
    """Call ``make`` on rank 0, and return its result on every rank.

    It is collective over ``comm``.

    Args:
        comm: The ranks that take part.
        make: The function that rank 0 calls; where it raises, every rank raises as :func:`agree` describes.
        waiter: The waiter of this rank.
    """
    value: Any = None
    with agreed(comm, waiter):
        if comm.rank == 0:
            value = make()
    return broadcast_object(comm, value, waiter)


def broadcast_object(comm: MPI.Comm, value: Any, waiter: Waiter) -> Any:
    """Return rank 0's ``value`` on every rank; this is collective over ``comm``.

    Args:
        comm: The ranks that take part.
        value: The object at rank 0; it is ignored elsewhere.
        waiter: The waiter of this rank.
    """
    data = np.frombuffer(pickle.dumps(value), np.uint8) if comm.rank == 0 else None
    length = np.array([0 if data is None else len(data)], np.int64)
    waiter.wait(comm.Ibcast(length))
    buffer = np.empty(int(length[0]), np.uint8)
    if data is not None:
        buffer[:] = data
    waiter.wait(comm.Ibcast(buffer))
    return pickle.loads(buffer.tobytes())  # noqa: S301  (from a rank of our own job)


def gather_objects(comm: MPI.Comm, value: Any, waiter: Waiter) -> list[Any] | None:
    """Gather every rank's ``value`` at rank 0; this is collective over ``comm``.

    Args:
        comm: The ranks that take part.
        value: The object of this rank.
        waiter: The waiter of this rank.

    Returns:
        The values in the order of the ranks at rank 0; None elsewhere.
    """
    gathered = gather_arrays(comm, np.frombuffer(pickle.dumps(value), np.uint8), waiter)
    if gathered is None:
        return None
    everything, lengths = gathered
    parts = np.split(everything, np.cumsum(lengths)[:-1])
    return [pickle.loads(part.tobytes()) for part in parts]  # noqa: S301


def gather_arrays(comm: MPI.Comm, values: NDArray, waiter: Waiter) -> tuple[NDArray, NDArray[np.int64]] | None:
    """Gather every rank's 1-D array at rank 0; this is collective over ``comm``.

    Args:
        comm: The ranks that take part.
        values: (n,) The array of this rank; all arrays have one element type.
        waiter: The waiter of this rank.

    Returns:
        The values, one rank after another, and the (ranks,) number of values of each, at rank 0; None elsewhere.
    """
    lengths = np.zeros(comm.size, np.int64)
    waiter.wait(comm.Igather(np.array([len(values)], np.int64), lengths if comm.rank == 0 else None))
    if comm.rank != 0:
        waiter.wait(comm.Igatherv(values, None))
        return None
    everything = np.empty(int(lengths.sum()), values.dtype)
    waiter.wait(comm.Igatherv(values, [everything, (lengths, np.cumsum(lengths) - lengths)]))
    return everything, lengths


def agree(comm: MPI.Comm, error: Exception | None, waiter: Waiter) -> None:
    """Raise on every rank of ``comm`` if any rank has an error; this is collective over ``comm``.

    The error of the lowest rank is raised. Where it is a :class:`UserError`, it keeps its type on every rank; otherwise
    ranks with an error raise their own, and the others raise a RuntimeError.

    Args:
        comm: The ranks that take part.
        error: The error of this rank, or None.
        waiter: The waiter of this rank.
    """
    bad = np.array([comm.rank if error is not None else comm.size], np.int64)
    request = comm.Iallreduce(MPI.IN_PLACE, bad, op=MPI.MIN)
    if error is not None:
        _speak_where_others_are_late(request, error)
    waiter.wait(request)
    first = int(bad[0])
    if first == comm.size:
        return
    note = np.zeros(NOTE_BYTES, np.uint8)
    if comm.rank == first:
        written = pickle.dumps((error if isinstance(error, UserError) else None, str(error)[:1000]))
        note[: len(written)] = np.frombuffer(written, np.uint8)
    waiter.wait(comm.Ibcast(note, root=first))
    user_error, text = pickle.loads(note.tobytes())  # noqa: S301
    if user_error is not None:
        user_error.everywhere = True
        raise user_error
    raise error if error is not None else RuntimeError(f"rank {first} failed: {text}")


def _speak_where_others_are_late(request: MPI.Request, error: Exception) -> None:
    """Log ``error`` if ``request`` does not complete soon, as other ranks may be waiting for this one elsewhere."""
    begun = time.monotonic()
    while not request.Test():
        if time.monotonic() - begun > PATIENCE_SECONDS:
            logger.error("%s (other ranks have not heard of it yet)", error)
            return
        time.sleep(1e-3)


logger = logging.getLogger("hiermpi")

ErrorSink = Callable[[int, str], str | None]
"""A function that stores the rank and traceback of an error; it returns the path, or None where it could not."""

_error_sink: ErrorSink | None = None


def set_error_sink(sink: ErrorSink | None) -> None:
    """Set the function that stores tracebacks of unexpected errors; with None, as at first, they go to stderr."""
    global _error_sink
    _error_sink = sink


def run_collectively(body: Callable[[MPI.Comm], int]) -> None:
    """Run ``body`` on every rank and exit with the code that it returns; this function never returns.

    Rank 0 prints a :class:`UserError` that every rank raises (see :func:`agree`). Any other exception, on whichever
    rank, is reported once and ends the whole job.
    """
    world = MPI.COMM_WORLD
    try:
        code = body(world)
    except UserError as error:
        if world.rank == 0 or not error.everywhere:
            logger.error("%s", error)
        code = error.exit_code
        if not error.everywhere and world.size > 1:
            flush()
            world.Abort(code)
    except BaseException as error:  # noqa: BLE001  (whatever it is, the other ranks must not wait for this one)
        abort(error)
    leave(code)


def leave(code: int) -> None:
    """End this process with ``code`` once every rank has called this; it is collective and never returns."""
    flush()
    Waiter().wait(MPI.COMM_WORLD.Ibarrier())
    MPI.Finalize()
    os._exit(code)  # under -m mpi4py a SystemExit would be an MPI_Abort


def abort(error: BaseException) -> None:
    """Report ``error`` with rank and host, and end all ranks; this function never returns."""
    rank = MPI.COMM_WORLD.rank
    time.sleep(min(0.02 * rank, 1.0))  # where all ranks fail alike, the first one reports it
    try:
        where = _error_sink(rank, "".join(traceback.format_exception(error))) if _error_sink else None
    except Exception:  # noqa: BLE001  (a full disk must not hide the first error)
        where = None
    if where is None:
        sys.stderr.write("".join(traceback.format_tb(error.__traceback__)))
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    hint = f"; the traceback is in {where}" if where else ""
    logger.critical("rank %d on %s failed: %s%s", rank, socket.gethostname(), reason, hint)
    flush()
    MPI.COMM_WORLD.Abort(EXIT_ERROR)
    os._exit(EXIT_ERROR)


def flush() -> None:
    """Write out what the standard streams still buffer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
