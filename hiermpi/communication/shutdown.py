"""Start and end of a collective command: every end goes through here.

The first rank that exits non-zero makes the launcher kill the others, so an early ``sys.exit`` would lose the
others' work: ranks meet, finalize, and only then exit.
"""

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

from mpi4py import MPI

from hiermpi.communication.waiting import Waiter
from hiermpi.errors import EXIT_ERROR, UserError

logger = logging.getLogger("hiermpi")

ErrorSink = Callable[[int, str], str | None]
"""Stores (rank, traceback) and returns where, or None where it could not."""

_error_sink: ErrorSink | None = None


def set_error_sink(sink: ErrorSink | None) -> None:
    """Set where the traceback of an unexpected error goes from now on; None is stderr, as at the start."""
    global _error_sink
    _error_sink = sink


def run_collectively(body: Callable[[MPI.Comm], int]) -> None:
    """Run ``body`` on every rank and leave the process with its exit code; never returns.

    A :class:`UserError` that every rank raises (see :func:`agree`) is printed by rank 0. Any other exception, on
    whichever rank, is reported once and ends the whole job.
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
    """End this process with ``code`` once every rank is here; never returns. Collective over COMM_WORLD."""
    flush()
    Waiter().wait(MPI.COMM_WORLD.Ibarrier())
    MPI.Finalize()
    os._exit(code)  # under -m mpi4py a SystemExit would be an MPI_Abort


def abort(error: BaseException) -> None:
    """Report ``error`` with rank and host and end all ranks; never returns."""
    rank = MPI.COMM_WORLD.rank
    time.sleep(min(0.02 * rank, 1.0))  # where all ranks fail alike, the first one speaks for all
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
    """Write out what the standard streams still hold."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
