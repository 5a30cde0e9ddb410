"""State that lies with its owners, brought to the root for a checkpoint and dealt out again from one."""

from collections.abc import Callable, Iterator
from functools import partial

from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import pipelined, span_chunks
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels.memory import lazy_zeros


def gather_owned(comms: Communicators, ownership: Ownership, vector: NDArray | None) -> NDArray | None:
    """The whole vector at the root, from the parts of its owners; None elsewhere.

    Collective over the root and the owners; others may call it.

    Args:
        comms: the hierarchy.
        ownership: whose the parts are.
        vector: this rank's, of full length; None where it owns nothing.
    """
    if comms.rank != 0:
        _exchange(comms, ownership, vector, to_root=True)
        return None
    assert vector is not None
    if not ownership.shared_out:
        return vector
    whole = lazy_zeros(ownership.size, vector.dtype)
    for start, stop, _ in ownership.spans_of(0):
        whole[start:stop] = vector[start:stop]
    _exchange(comms, ownership, whole, to_root=True)
    return whole


def deal_out_owned(
    comms: Communicators, ownership: Ownership, whole: NDArray | None, vector: NDArray | None
) -> None:
    """Fill each owner's part of its ``vector`` from the root's ``whole``. Collective like :func:`gather_owned`."""
    if comms.rank != 0:
        _exchange(comms, ownership, vector, to_root=False)
    elif whole is not None and vector is not None:
        for start, stop, _ in ownership.spans_of(0):
            vector[start:stop] = whole[start:stop]
        _exchange(comms, ownership, whole, to_root=False)


def _exchange(comms: Communicators, ownership: Ownership, vector: NDArray | None, to_root: bool) -> None:
    """Messages between the root and every other owner, span by span in the order of the vector."""
    control = comms.control
    if control == MPI.COMM_NULL or vector is None:
        return

    def starts() -> Iterator[Callable[[], MPI.Request]]:
        here = control.rank
        spans = [span for span in ownership.spans if span.owner != 0 and here in (0, span.owner)]
        for chunk, owner in span_chunks(vector, spans):
            send = control.Isend if to_root == (here != 0) else control.Irecv
            yield partial(send, chunk, 0 if here else owner)

    pipelined(comms.waiter, starts())
