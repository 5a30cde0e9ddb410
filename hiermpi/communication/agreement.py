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
"""How long a rank with an error waits for the others before it says what has happened."""
CLAIM_TAG = 32_101
"""The tag of the messages by which ranks that fail alone find out who tells it."""
LOOK_SECONDS = 0.03
"""How long a rank looks for claims that came before its own."""
CLAIM_SECONDS = 0.5
"""How long it looks for those that came at the same time."""

logger = logging.getLogger("hiermpi")
T = TypeVar("T")


@contextmanager
def agreed(comm: MPI.Comm, waiter: Waiter, patient: bool = True) -> Iterator[None]:
    """Run the body; raise on every rank of ``comm`` where it raised on any. Collective over ``comm``.

    See :func:`agree` for what is raised.

    Args:
        comm: The ranks. While the rank is patient, the body must not call anything that is collective.
        waiter: Does the waiting.
        patient: Whether a rank with an error waits for the others as long as it takes. Otherwise it soon raises its
            error alone: they may wait for it elsewhere, in something collective over another communicator.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
        error = caught
    agree(comm, error, waiter, patient)


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


def agree(comm: MPI.Comm, error: Exception | None, waiter: Waiter, patient: bool = True) -> None:
    """Raise on every rank of ``comm`` if any rank brings an error. Collective over ``comm``.

    A :class:`UserError` keeps its type everywhere; the lowest rank's wins. Other errors are raised where they are
    and become a RuntimeError elsewhere. A rank that is not ``patient`` soon raises its error though others are late.
    """
    bad = np.array([comm.rank if error is not None else comm.size], np.int64)
    request = comm.Iallreduce(MPI.IN_PLACE, bad, op=MPI.MIN)
    if error is not None and late(request):
        if not patient:
            raise error
        logger.error("%s (other ranks have not heard of it yet)", error)
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


def late(request: MPI.Request) -> bool:
    """Tell whether ``request`` does not complete soon: other ranks may be waiting for this one elsewhere."""
    begun = time.monotonic()
    while not request.Test():
        if time.monotonic() - begun > PATIENCE_SECONDS:
            return True
        time.sleep(1e-3)
    return False


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
        code = error.exit_code
        if not error.everywhere and world.size > 1:
            if not others_speak(world):
                logger.error("%s", error)
            flush()
            world.Abort(code)
        if world.rank == 0:
            logger.error("%s", error)
    except BaseException as error:  # noqa: BLE001  (whatever it is, the other ranks must not wait for this one)
        abort(error)
    leave(code)


def others_speak(world: MPI.Comm) -> bool:
    """Tell whether another rank tells an error of its own: of several that fail alone, the first or lowest speaks."""
    if claimed(world, world.size, LOOK_SECONDS):
        time.sleep(PATIENCE_SECONDS)  # until that rank ends this one
        return True
    claims = [world.Isend(b"", rank, CLAIM_TAG) for rank in range(world.size) if rank != world.rank]
    spoken = world.rank > 0 and claimed(world, world.rank, CLAIM_SECONDS)
    if spoken:
        time.sleep(PATIENCE_SECONDS)
    del claims
    return spoken


def claimed(world: MPI.Comm, below: int, seconds: float) -> bool:
    """Tell whether, within some time, a rank below a number says that it tells its error."""
    begun, status = time.monotonic(), MPI.Status()
    while time.monotonic() - begun < seconds:
        if world.Iprobe(MPI.ANY_SOURCE, CLAIM_TAG, status):
            world.Recv(bytearray(0), status.source, CLAIM_TAG)
            if status.source < below:
                return True
        time.sleep(1e-3)
    return False


def leave(code: int) -> None:
    """End this process with ``code`` once every rank has called this; it is collective and never returns."""
    flush()
    Waiter().wait(MPI.COMM_WORLD.Ibarrier())
    MPI.Finalize()
    os._exit(code)  # under -m mpi4py a SystemExit would be an MPI_Abort


def abort(error: BaseException) -> None:
    """Report ``error`` with rank and host, and end all ranks; this function never returns."""
    rank = MPI.COMM_WORLD.rank
    give_way()
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


def give_way() -> None:
    """Wait a little, the longer the higher the rank: where all ranks fail alike, the first one speaks for all."""
    time.sleep(min(0.02 * MPI.COMM_WORLD.rank, 1.0))


def flush() -> None:
    """Write out what the standard streams still buffer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
