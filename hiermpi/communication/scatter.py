"""This module sends records, texts and the owners' state between the root and the other ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.node import NodeMemory
from hiermpi.communication.reduction import pipelined, span_chunks
from hiermpi.communication.waiting import Waiter
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels.gates import deal_records, gate_bytes, make_gate
from hiermpi.kernels.memory import lazy_zeros, offsets_of


def delivery_order(topology: Topology) -> NDArray[np.int64]:
    """Return the (ranks,) order in which the root sends records: to itself, then group by group."""
    return np.array([0, *(rank for members in topology.groups for rank in members)])


class Scatter(Protocol):
    """A scatter delivers to each rank the records that it computes."""

    def scatter(self, records: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """Deliver a batch; return this rank's records in the order of the batch.

        This is collective over the hierarchy.

        Args:
            records: (B, width) The batch at the root; None elsewhere.
            leaf: (B,) The rank that gets each record, at the root; None elsewhere.
        """


def make_scatter(comms: Communicators, width: int, usual: int, in_memory: bool) -> Scatter:
    """Make the scatter for the records of a run; this is collective over the hierarchy.

    Args:
        comms: The communicators of the hierarchy.
        width: The number of columns of a record.
        usual: The number of records of a usual batch.
        in_memory: Whether the ranks of a node may share memory, which is used where there is only one node.
    """
    if in_memory and comms.topology.n_nodes == 1:
        return SharedScatter(comms, width, usual)
    return TreeScatter(comms, width)


class SharedScatter:
    """A scatter through shared memory: the root writes records where all ranks of its node read them.

    There is memory for two sets of records, so that the root need not wait for ranks that still read the last set.

    Args:
        comms: The communicators of the hierarchy, on one node.
        width: The number of columns of a record.
        capacity: The number of records of a set; a larger batch is sent in several sets.
    """

    def __init__(self, comms: Communicators, width: int, capacity: int) -> None:
        self.comms = comms
        self.capacity = capacity
        size = comms.node.size
        pieces = [gate_bytes(1), *[gate_bytes(size)] * 2, *[8 * (size + 1)] * 2, *[4 * capacity * width] * 2]
        *offsets, end = offsets_of(*pieces)
        memory = NodeMemory(comms.node, end, comms.waiter)
        self._ready = make_gate(memory, offsets[0], [0], comms.waiter)
        self._taken = [make_gate(memory, offset, range(size), comms.waiter) for offset in offsets[1:3]]
        self._bounds = [memory.array(offset, (size + 1,), np.int64) for offset in offsets[3:5]]
        self._records = [memory.array(offset, (capacity, width), np.int32) for offset in offsets[5:]]
        self._turn = 0

    def scatter(self, records: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """Deliver a batch, see :meth:`Scatter.scatter`."""
        rank, capacity = self.comms.rank, self.capacity
        mine: list[NDArray[np.int32]] = []
        first, total = 0, 1
        while first < total:
            # The two sets alternate: the root writes one again when all ranks have read it.
            self._turn = 1 - self._turn
            bounds, room, taken = self._bounds[self._turn], self._records[self._turn], self._taken[self._turn]
            if records is not None and leaf is not None:
                taken.wait()
                deal_records(room, bounds, records, leaf, first)
            self._ready.arrive()
            self._ready.wait()
            total = int(bounds[-1])
            start = min(max(int(bounds[rank]) - first, 0), capacity)
            stop = min(max(int(bounds[rank + 1]) - first, 0), capacity)
            mine.append(room[start:stop].copy())
            taken.arrive()
            first += capacity
        return mine[0] if len(mine) == 1 else np.concatenate(mine)


class TreeScatter:
    """A scatter by messages: from the root to the control ranks, and from these to their workers.

    Args:
        comms: The communicators of the hierarchy.
        width: The number of columns of a record.
    """

    def __init__(self, comms: Communicators, width: int) -> None:
        self.comms = comms
        self.width = width
        topology = comms.topology
        self._position = np.empty(topology.size, np.int64)
        self._position[delivery_order(topology)] = np.arange(topology.size)

    def scatter(self, records: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """Deliver a batch, see :meth:`Scatter.scatter`."""
        comms = self.comms
        counts = np.zeros(comms.size, np.int32)
        mine = np.empty((0, self.width), np.int32)
        if records is not None and leaf is not None:
            counts[:] = np.bincount(leaf, minlength=comms.size)
            mine = records[np.argsort(self._position[leaf], kind="stable")]
        for comm in comms.levels_down():
            comms.waiter.wait(comm.Ibcast(counts))
        if comms.in_control:
            members = [(0,), *comms.topology.groups]
            mine = self._scatter_level(comms.control, mine, [int(counts[list(ranks)].sum()) for ranks in members])
        if comms.in_group:
            members_below = comms.topology.groups[comms.group_index]
            mine = self._scatter_level(comms.group, mine, [int(counts[rank]) for rank in members_below])
        return mine

    def _scatter_level(self, comm: MPI.Comm, records: NDArray[np.int32], counts: list[int]) -> NDArray[np.int32]:
        received = np.empty((counts[comm.rank], self.width), np.int32)
        if max(counts) * self.width * len(counts) < 2**31:
            sizes = [count * self.width for count in counts]
            send = [records, (sizes, list(np.cumsum([0, *sizes[:-1]])))] if comm.rank == 0 else None
            self.comms.waiter.wait(comm.Iscatterv(send, received))
            return received
        raise ValueError(f"a batch of {sum(counts)} sequences of {self.width} columns is too large for one message")


def deal_texts(comm: MPI.Comm, texts: Sequence[bytes] | None, waiter: Waiter) -> list[bytes] | None:
    """Give each rank consecutive texts of rank 0, with about equally many bytes for each rank.

    This is collective over ``comm``.

    Args:
        comm: The ranks that take part.
        texts: The texts at rank 0, which may give None; None elsewhere.
        waiter: The waiter of this rank.

    Returns:
        The texts of this rank; None on every rank where rank 0 gave None.
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
    """Return the (n,) rank of each text, by the position of its middle byte in all the bytes."""
    ends = np.cumsum(lengths)
    middles = ends - np.asarray(lengths) / 2
    return np.minimum(middles * size // max(int(ends[-1]) if len(ends) else 0, 1), size - 1).astype(np.int64)


def gather_owned(
    comms: Communicators, ownership: Ownership, state: Mapping[str, NDArray] | None
) -> dict[str, NDArray] | None:
    """Gather whole vectors at the root from the parts of their owners.

    This is collective over the root and the owners; other ranks may call it too.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part.
        state: The (size,) vectors of this rank by name, of which it has what it owns; the names and their order are the
            same on every rank. None where the rank owns nothing.

    Returns:
        The whole vectors by name at the root, None elsewhere. Where the root owns everything, they are its own vectors
        and not copies.
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
    """Fill each owner's parts of its vectors from the root's whole vectors.

    This is collective over the root and the owners; other ranks may call it too.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part.
        whole: The (size,) vectors by name at the root; None elsewhere.
        state: The vectors of this rank by name, see :func:`gather_owned`; only what is owned is written.
    """
    for name, vector in (state or {}).items():
        if comms.rank != 0:
            _send_parts(comms, ownership, vector, to_root=False)
        elif whole is not None:
            for start, stop, _ in ownership.spans_of(0):
                vector[start:stop] = whole[name][start:stop]
            _send_parts(comms, ownership, whole[name], to_root=False)


def _gathered(comms: Communicators, ownership: Ownership, vector: NDArray) -> NDArray:
    """Return one whole vector at the root, from its own parts and those of the other owners.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part.
        vector: (size,) The vector of the root, of which it has what it owns.
    """
    whole = lazy_zeros(ownership.size, vector.dtype)
    for start, stop, _ in ownership.spans_of(0):
        whole[start:stop] = vector[start:stop]
    _send_parts(comms, ownership, whole, to_root=True)
    return whole


def _send_parts(comms: Communicators, ownership: Ownership, vector: NDArray, to_root: bool) -> None:
    """Send parts between the root and every other owner, span by span in the order of the vector.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part.
        vector: (size,) The vector of this rank.
        to_root: Whether the owners send to the root; otherwise the root sends to them.
    """
    if not comms.in_control:
        return
    control, here = comms.control, comms.control.rank

    def starts() -> Iterator[Callable[[], MPI.Request]]:
        spans = [span for span in ownership.spans if span.owner != 0 and here in (0, span.owner)]
        for chunk, owner in span_chunks(vector, spans):
            send = control.Isend if to_root == (here != 0) else control.Irecv
            yield partial(send, chunk, 0 if here else owner)

    pipelined(comms.waiter, starts())
