"""Byte strings dealt out to all ranks of a communicator."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.waiting import Waiter


def deal_texts(comm: MPI.Comm, texts: Sequence[bytes] | None, waiter: Waiter) -> list[bytes] | None:
    """This rank's share of rank 0's ``texts``: consecutive ones, about equal bytes each. Collective over ``comm``.

    Args:
        comm: all ranks take part.
        texts: at rank 0; elsewhere None.
        waiter: for the waits.

    Returns:
        None on every rank where rank 0 gave None.
    """
    lengths: list[int] | None = broadcast_object(comm, [len(t) for t in texts] if texts is not None else None, waiter)
    if lengths is None:
        return None
    owner = owners(lengths, comm.size)
    counts = np.bincount(owner, weights=lengths, minlength=comm.size).astype(np.int64)
    mine = np.empty(int(counts[comm.rank]), np.uint8)
    send = None
    if texts is not None:
        everything = np.frombuffer(b"".join(texts), np.uint8)
        send = [everything, (counts, np.cumsum(counts) - counts)]
    waiter.wait(comm.Iscatterv(send, mine))
    ends = np.cumsum([0, *(length for length, rank in zip(lengths, owner, strict=True) if rank == comm.rank)])
    return [mine[a:b].tobytes() for a, b in pairwise(ends)]


def owners(lengths: Sequence[int], size: int) -> NDArray[np.int64]:
    """Rank of each text: by where its middle stands in all the bytes."""
    ends = np.cumsum(lengths)
    middles = ends - np.asarray(lengths) / 2
    return np.minimum(middles * size // max(int(ends[-1]) if len(ends) else 0, 1), size - 1).astype(np.int64)
