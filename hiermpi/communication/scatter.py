"""Give each rank the rows that it computes: down the tree, or in memory that all ranks share."""

from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.shared_memory import Gate, NodeMemory
from hiermpi.hierarchy.topology import Role, Topology
from hiermpi.kernels.memory import address_of, offsets_of


def delivery_order(topology: Topology) -> NDArray[np.int64]:
    """Ranks in the order in which their rows leave the root: itself, then group by group, control rank first."""
    return np.array([0, *(rank for members in topology.groups for rank in members)])


class Scatter(Protocol):
    """Delivers to each rank the rows it computes."""

    def scatter(self, rows: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """This rank's rows, in the order of the batch. Collective over the hierarchy.

        Args:
            rows: at the root (B, width) the batch; elsewhere None.
            leaf: at the root (B,) the rank that gets each row; elsewhere None.
        """


def make_scatter(comms: Communicators, width: int, rows: int, in_memory: bool) -> Scatter:
    """The scatter for rows of ``width`` columns. Collective over the hierarchy.

    Args:
        comms: the hierarchy.
        width: columns of a row.
        rows: of a usual batch.
        in_memory: whether the ranks of a node share memory; it is used where there is but one node.
    """
    if in_memory and comms.topology.n_nodes == 1:
        return SharedScatter(comms, width, rows)
    return BatchScatter(comms, width)


class SharedScatter:
    """The root writes rows where all ranks of its node read them, ``capacity`` at a time, and waits for nobody.

    Args:
        comms: the hierarchy, on one node.
        width: columns of a row.
        capacity: rows that there is memory for, twice.
    """

    def __init__(self, comms: Communicators, width: int, capacity: int) -> None:
        self.comms = comms
        self.capacity = capacity
        self.width = width
        size = comms.node.size
        pieces = [Gate.nbytes(1), *[Gate.nbytes(size)] * 2, *[8 * (size + 1)] * 2, *[4 * capacity * width] * 2]
        *offsets, end = offsets_of(*pieces)
        memory = NodeMemory(comms.node, end, comms.waiter)
        self._ready = Gate(memory, offsets[0], [0], comms.waiter)
        self._taken = [Gate(memory, offset, range(size), comms.waiter) for offset in offsets[1:3]]
        self._bounds = [memory.array(offset, (size + 1,), np.int64) for offset in offsets[3:5]]
        self._rows = [memory.array(offset, (capacity, width), np.int32) for offset in offsets[5:]]
        self._next = np.empty(size, np.int64)
        self._library = memory.library
        self._turn = 0

    def scatter(self, rows: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """See :meth:`Scatter.scatter`."""
        rank, capacity = self.comms.rank, self.capacity
        mine: list[NDArray[np.int32]] = []
        first, total = 0, 1
        while first < total:
            # Two sets take turns: the root writes one again when all have taken what was there.
            self._turn = 1 - self._turn
            bounds, room, taken = self._bounds[self._turn], self._rows[self._turn], self._taken[self._turn]
            if rows is not None and leaf is not None:
                taken.wait()
                self._write(bounds, room, rows, leaf, first)
            self._ready.arrive()
            self._ready.wait()
            total = int(bounds[-1])
            start = min(max(int(bounds[rank]) - first, 0), capacity)
            stop = min(max(int(bounds[rank + 1]) - first, 0), capacity)
            mine.append(room[start:stop].copy())
            taken.arrive()
            first += capacity
        return mine[0] if len(mine) == 1 else np.concatenate(mine)

    def _write(
        self, bounds: NDArray[np.int64], room: NDArray[np.int32], rows: NDArray[np.int32], leaf: NDArray, first: int
    ) -> None:
        """Where each rank's rows are, and those from ``first`` on that there is room for, in the order of the ranks."""
        n, size, library = len(rows), self.comms.size, self._library
        if library is not None and n <= self.capacity:
            rows, leaf = np.ascontiguousarray(rows, np.int32), np.ascontiguousarray(leaf, np.int64)
            arrays = (room, bounds, rows, leaf, self._next)
            library.deal_rows(*(address_of(array) for array in arrays), n, 4 * self.width, size)
            return
        bounds[0] = 0
        np.cumsum(np.bincount(leaf, minlength=size), out=bounds[1:])
        part = np.argsort(leaf, kind="stable")[first : first + self.capacity]
        np.take(rows, part, axis=0, out=room[: len(part)])


class BatchScatter:
    """Root to control ranks, control ranks to their workers.

    Args:
        comms: the hierarchy.
        width: columns of a row.
    """

    def __init__(self, comms: Communicators, width: int) -> None:
        self.comms = comms
        self.width = width
        topology = comms.topology
        self._order = delivery_order(topology)
        self._place = np.empty(topology.size, np.int64)
        self._place[self._order] = np.arange(topology.size)

    def scatter(self, rows: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """See :meth:`Scatter.scatter`."""
        comms = self.comms
        counts = np.zeros(comms.size, np.int32)
        mine = np.empty((0, self.width), np.int32)
        if rows is not None and leaf is not None:
            counts[:] = np.bincount(leaf, minlength=comms.size)
            mine = rows[np.argsort(self._place[leaf], kind="stable")]
        for comm in comms.levels_down():
            comms.waiter.wait(comm.Ibcast(counts))
        if comms.control != MPI.COMM_NULL:
            members = [(0,), *comms.topology.groups]
            mine = self._scatter_level(comms.control, mine, [int(counts[list(ranks)].sum()) for ranks in members])
        if comms.role is not Role.ROOT:
            members_below = comms.topology.groups[comms.group_index]
            mine = self._scatter_level(comms.group, mine, [int(counts[rank]) for rank in members_below])
        return mine

    def _scatter_level(self, comm: MPI.Comm, rows: NDArray[np.int32], counts: list[int]) -> NDArray[np.int32]:
        received = np.empty((counts[comm.rank], self.width), np.int32)
        if max(counts) * self.width * len(counts) < 2**31:
            sizes = [count * self.width for count in counts]
            send = [rows, (sizes, list(np.cumsum([0, *sizes[:-1]])))] if comm.rank == 0 else None
            self.comms.waiter.wait(comm.Iscatterv(send, received))
            return received
        raise ValueError(f"a batch of {sum(counts)} sequences of {self.width} columns is too large for one message")
