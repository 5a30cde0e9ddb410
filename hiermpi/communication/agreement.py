"""Small Python objects between ranks, and arrays of unequal lengths to rank 0, with sleeping waits.

Arrays never travel as objects.
"""

import pickle
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UserError


def broadcast_object(comm: MPI.Comm, value: Any, waiter: Waiter) -> Any:
    """Rank 0's ``value``, on every rank. Collective over ``comm``."""
    data = np.frombuffer(pickle.dumps(value), np.uint8) if comm.rank == 0 else None
    length = np.array([0 if data is None else len(data)], np.int64)
    waiter.wait(comm.Ibcast(length))
    buffer = np.empty(int(length[0]), np.uint8)
    if data is not None:
        buffer[:] = data
    waiter.wait(comm.Ibcast(buffer))
    return pickle.loads(buffer.tobytes())  # noqa: S301  (from a rank of our own job)


def gather_objects(comm: MPI.Comm, value: Any, waiter: Waiter) -> list[Any] | None:
    """Every rank's ``value`` in rank order at rank 0, None elsewhere. Collective over ``comm``."""
    gathered = gather_arrays(comm, np.frombuffer(pickle.dumps(value), np.uint8), waiter)
    if gathered is None:
        return None
    everything, lengths = gathered
    parts = np.split(everything, np.cumsum(lengths)[:-1])
    return [pickle.loads(part.tobytes()) for part in parts]  # noqa: S301


def gather_arrays(comm: MPI.Comm, values: NDArray, waiter: Waiter) -> tuple[NDArray, NDArray[np.int64]] | None:
    """Every rank's 1-D ``values`` of one type, one after another, and how many each has, at rank 0; None elsewhere.

    Collective over ``comm``.
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
    """Raise on every rank of ``comm`` if any rank brings an error. Collective over ``comm``.

    A :class:`UserError` keeps its type everywhere; the lowest rank's wins. Other errors are raised where they are
    and become a RuntimeError elsewhere.
    """
    bad = np.array([comm.rank if error is not None else comm.size], np.int64)
    waiter.wait(comm.Iallreduce(MPI.IN_PLACE, bad, op=MPI.MIN))
    first = int(bad[0])
    if first == comm.size:
        return
    told = np.zeros(4096, np.uint8)
    if comm.rank == first:
        note = pickle.dumps((error if isinstance(error, UserError) else None, str(error)[:1000]))
        told[: len(note)] = np.frombuffer(note, np.uint8)
    waiter.wait(comm.Ibcast(told, root=first))
    user_error, text = pickle.loads(told.tobytes())  # noqa: S301
    if user_error is not None:
        user_error.everywhere = True
        raise user_error
    raise error if error is not None else RuntimeError(f"rank {first} failed: {text}")
