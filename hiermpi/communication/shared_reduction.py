"""Sums in memory that a node's ranks share: level 1 is the node, level 2 joins the nodes.

Every rank of a node sums its own slices over the gradients of all leaves there, in the order of the ranks, into a
vector of the node. Where there are several nodes, the ranks at place k of each then carry the k-th part of that vector
between them, each part to the node of its owner, chunk by chunk: as many communicators of leaders as the smallest node
has ranks. There is one copy of the parameters per node, so a broadcast inside a node is a barrier. Groups decide
routing and ownership, the machine decides the sum.
"""

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import broadcast_spans, exchange_on_control, reduce_spans
from hiermpi.communication.shared_memory import NodeBarrier, NodeMemory, whole_lines
from hiermpi.hierarchy.ownership import Ownership, lanes, node_sums, spans_of
from hiermpi.model.kernels import load_kernels
from hiermpi.model.parameters import lazy_zeros

EXCHANGED_ROWS = 2


class SharedReduction:
    """Sums and broadcasts through node-shared memory. Collective over the hierarchy, like its methods.

    Args:
        comms: the hierarchy.
        ownership: of the gradient and parameter vectors.
        dtype: of the gradients: float32, or int64 for fixed point.

    Raises:
        UserError: on every rank of a node that cannot have the memory.
    """

    name = "shared"
    keeps_gradients = True

    def __init__(self, comms: Communicators, ownership: Ownership, dtype: DTypeLike = np.float32) -> None:
        self.comms = comms
        self.ownership = ownership
        node, topology, size = comms.node, comms.topology, ownership.size
        self._several = topology.n_nodes > 1
        parts = lanes(ownership, topology) if self._several else []
        carries = node.rank < len(parts)
        self._leaders = comms.world.Split(node.rank if carries else MPI.UNDEFINED, topology.nodes[comms.rank])
        self._lane = parts[node.rank] if carries else []
        """What this rank carries between the nodes."""
        summed_by = node_sums(ownership, topology, topology.nodes[comms.rank])
        self._slices = [span for span in spans_of(ownership.bounds, summed_by) if span.owner == node.rank]
        owned_by = np.array(ownership.ranks)[ownership.owners]
        self._sums_its_own = not self._several and bool((summed_by == owned_by).all())
        """Whether every owner sums what it owns, so that it need not wait for others' sums."""
        number = ownership.number(comms.rank)
        self._blocks = np.empty(0, np.int64) if number is None else ownership.blocks_of(number)
        stride = whole_lines(4 * size) // 4
        width, n_blocks = np.dtype(dtype).itemsize, len(ownership.owners)
        barrier_bytes = NodeBarrier.nbytes(node.size)
        exchanged_bytes = whole_lines(8 * EXCHANGED_ROWS * n_blocks)
        parameters_at = barrier_bytes + exchanged_bytes
        sums_at = parameters_at + 4 * stride
        leaves = [rank for rank in topology.ranks_of_node[topology.nodes[comms.rank]] if topology.is_leaf(rank)]
        n_buffers = max(len(leaves), 1)  # where nobody computes, zeros
        memory = NodeMemory(node, sums_at + width * stride * (n_buffers + 1), comms.waiter)
        self._barrier = NodeBarrier(memory, 0, node, comms.waiter)
        self._exchanged = memory.array(barrier_bytes, (EXCHANGED_ROWS, n_blocks), np.float64)
        self._parameters = memory.array(parameters_at, (stride,), np.float32)
        self._total = memory.array(sums_at, (stride,), dtype)
        self._buffers = memory.array(sums_at + width * stride, (n_buffers, stride), dtype)
        self._gradients = lazy_zeros(size, dtype)  # of a rank that never computes
        if comms.rank in leaves:
            self._gradients = self._buffers[leaves.index(comms.rank), :size]
        self._size = size
        self._kernels = load_kernels()
        self._turn = 0

    def gradient_vector(self) -> NDArray:
        return self._gradients

    def parameter_vector(self) -> NDArray[np.float32]:
        return self._parameters[: self._size]

    def share(self, parameters: NDArray[np.float32]) -> None:
        self._barrier.wait()
        if self._several:
            if self._leaders != MPI.COMM_NULL:
                from_root = [span._replace(owner=0) for span in self._lane]
                broadcast_spans(self.comms.waiter, self._leaders, parameters, from_root)
            self._barrier.wait()

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Where one node's owners sum what they own, behind one barrier."""
        boxes = self._next_mailboxes()
        boxes[self.comms.node.rank, : len(sums)] = sums
        self._barrier.wait()
        for start, stop, _ in self._slices:
            self.sum_part(start, stop)
        sums[:] = boxes[:, : len(sums)].sum(axis=0)
        total = self._total[: self._size]
        if not self._sums_its_own:
            self._barrier.wait()
        if self._several:
            if self._leaders != MPI.COMM_NULL:
                self.comms.waiter.wait(self._leaders.Iallreduce(MPI.IN_PLACE, sums))
                reduce_spans(self.comms.waiter, self._leaders, total, self._lane)
            self._tell_node(sums)
        return total

    def sum_part(self, start: int, stop: int) -> None:
        """Sum these elements over the node's gradients, waiting for nobody."""
        self._kernels.sum_buffers(self._total, self._buffers, start, stop)

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """One barrier on one node, messages between the owners on several."""
        if self._several:
            exchange_on_control(self.comms, values)
            return
        if values is not None:
            self._exchanged[: len(values), self._blocks] = values[:, self._blocks]
        self._barrier.wait()
        if values is not None:
            values[:] = self._exchanged[: len(values)]

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """The owners' nodes have the parameters already; one barrier on one node."""
        if self._several:
            self._tell_node(verdict)  # true on the root's node; and all owners have written
            if self._leaders != MPI.COMM_NULL:
                self.comms.waiter.wait(self._leaders.Ibcast(verdict))
                if verdict[0]:
                    broadcast_spans(self.comms.waiter, self._leaders, parameters, self._lane)
        self._tell_node(verdict)

    def free(self) -> None:
        if self._leaders != MPI.COMM_NULL:
            self._leaders.Free()

    def _tell_node(self, values: NDArray[np.float64]) -> None:
        """Give every rank of the node the numbers of the first, behind a barrier."""
        boxes = self._next_mailboxes()
        if self.comms.node.rank == 0:
            boxes[0, : len(values)] = values
        self._barrier.wait()
        values[:] = boxes[0, : len(values)]

    def _next_mailboxes(self) -> NDArray[np.float64]:
        """Two sets take turns: a set is written again only after a barrier that all its readers have reached."""
        self._turn = 1 - self._turn
        return self._barrier.mailboxes[self._turn]
