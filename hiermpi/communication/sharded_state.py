"""State that lies with its owners, gathered at the root for a checkpoint and dealt out again from one."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import pipelined, span_chunks
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels.memory import lazy_zeros


def gather_owned(
    comms: Communicators, ownership: Ownership, state: Mapping[str, NDArray] | None
) -> dict[str, NDArray] | None:
    """Gather whole vectors at the root from the parts of their owners.

    Collective over the root and the owners; others may call it.

    Args:
        comms: the communicators of the hierarchy.
        ownership: the owner of each part.
        state: this rank's vectors by name, each (size,), of which it has what it owns; the same names in the same order
            on every rank. None where the rank owns nothing.

    Returns:
        At the root the whole vectors by name, None elsewhere. Where the root owns everything they are its own, not
        copies.
    """
    if comms.rank != 0:
        for vector in (state or {}).values():
            _send_parts(comms, ownership, vector, to_root=True)
        return None
    assert state is not None
    if not ownership.shared_out:
        return dict(state)
    return {name: _gathered(comms, ownership, vector) for name, vector in state.items()}


def deal_out_owned(
    comms: Communicators,
    ownership: Ownership,
    whole: Mapping[str, NDArray] | None,
    state: Mapping[str, NDArray] | None,
) -> None:
    """Fill each owner's parts of its vectors from the root's whole ones. Collective like :func:`gather_owned`.

    Args:
        comms: the communicators of the hierarchy.
        ownership: the owner of each part.
        whole: at the root the vectors by name, each (size,); elsewhere None.
        state: this rank's vectors by name, see :func:`gather_owned`; only what is owned is written.
    """
    for name, vector in (state or {}).items():
        if comms.rank != 0:
            _send_parts(comms, ownership, vector, to_root=False)
        elif whole is not None:
            for start, stop, _ in ownership.spans_of(0):
                vector[start:stop] = whole[name][start:stop]
            _send_parts(comms, ownership, whole[name], to_root=False)


def _gathered(comms: Communicators, ownership: Ownership, vector: NDArray) -> NDArray:
    """Return one whole vector at the root, from its own parts and those of the other owners."""
    whole = lazy_zeros(ownership.size, vector.dtype)
    for start, stop, _ in ownership.spans_of(0):
        whole[start:stop] = vector[start:stop]
    _send_parts(comms, ownership, whole, to_root=True)
    return whole


def _send_parts(comms: Communicators, ownership: Ownership, vector: NDArray, to_root: bool) -> None:
    """Send parts between the root and every other owner, span by span in the order of the vector."""
    if not comms.in_control:
        return
    control, here = comms.control, comms.control.rank

    def starts() -> Iterator[Callable[[], MPI.Request]]:
        spans = [span for span in ownership.spans if span.owner != 0 and here in (0, span.owner)]
        for chunk, owner in span_chunks(vector, spans):
            send = control.Isend if to_root == (here != 0) else control.Irecv
            yield partial(send, chunk, 0 if here else owner)

    pipelined(comms.waiter, starts())
