"""Scatter a batch down the tree: root to control ranks, control ranks to their workers."""

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.hierarchy.topology import Role, Topology


def delivery_order(topology: Topology) -> NDArray[np.int64]:
    """Ranks in the order in which their rows leave the root: itself, then group by group, control rank first."""
    return np.array([0, *(rank for members in topology.groups for rank in members)])


class BatchScatter:
    """Delivers to each rank the rows it computes.

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
        """This rank's rows, in the order of the batch. Collective over the hierarchy.

        Args:
            rows: at the root (B, width) the batch; elsewhere None.
            leaf: at the root (B,) the rank that gets each row; elsewhere None.
        """
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
