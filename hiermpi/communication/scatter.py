"""Give each rank the rows that it computes: down the tree, or in memory that all ranks share."""

from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.shared_memory import NodeBarrier, NodeMemory, whole_lines
from hiermpi.hierarchy.topology import Role, Topology


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
    """The root writes rows where all ranks of its node read them: a barrier for each ``capacity`` rows.

    Args:
        comms: the hierarchy, on one node.
        width: columns of a row.
        capacity: rows that there is memory for, twice.
    """

    def __init__(self, comms: Communicators, width: int, capacity: int) -> None:
        self.comms = comms
        self.capacity = capacity
        node = comms.node
        barrier_bytes = NodeBarrier.nbytes(node.size)
        bounds_bytes = whole_lines(8 * (node.size + 1))
        memory = NodeMemory(node, barrier_bytes + 2 * (bounds_bytes + 4 * capacity * width), comms.waiter)
        self._barrier = NodeBarrier(memory, 0, node, comms.waiter)
        self._bounds = memory.array(barrier_bytes, (2, bounds_bytes // 8), np.int64)
        self._rows = memory.array(barrier_bytes + 2 * bounds_bytes, (2, capacity, width), np.int32)
        self._turn = 0

    def scatter(self, rows: NDArray[np.int32] | None, leaf: NDArray[np.int64] | None) -> NDArray[np.int32]:
        """See :meth:`Scatter.scatter`."""
        comms, capacity = self.comms, self.capacity
        order = np.empty(0, np.int64) if leaf is None else np.argsort(leaf, kind="stable")
        mine: list[NDArray[np.int32]] = []
        first, total = 0, 1
        while first < total:
            # Two sets take turns: one is written again only after a barrier that all its readers have reached.
            self._turn = 1 - self._turn
            bounds, room = self._bounds[self._turn], self._rows[self._turn]
            if rows is not None and leaf is not None:
                bounds[0] = 0
                np.cumsum(np.bincount(leaf, minlength=comms.size), out=bounds[1 : comms.size + 1])
                part = order[first : first + capacity]
                np.take(rows, part, axis=0, out=room[: len(part)])
            self._barrier.wait()
            total = int(bounds[comms.size])
            start, stop = np.clip(bounds[comms.rank : comms.rank + 2] - first, 0, capacity)
            mine.append(room[start:stop].copy())
            first += capacity
        return mine[0] if len(mine) == 1 else np.concatenate(mine)


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
