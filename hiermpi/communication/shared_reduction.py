"""Sums in memory that a node's ranks share: level 1 is the node, level 2 its leaders.

Every rank of a node sums its own slice over the gradients of all ranks there, in the order of the ranks, into a vector
of the node; then the nodes' first ranks reduce theirs to the root, chunk by chunk. There is one
copy of the parameters per node, so a broadcast inside a node is a barrier. Groups decide routing and ownership, the
machine decides the sum.
"""

import logging

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.objects import agree
from hiermpi.communication.reduction import FlatReduction, Reduction, TreeReduction, chunked, ireduce_in_place
from hiermpi.communication.shared_memory import (
    LINE,
    NodeBarrier,
    NodeMemory,
    shared_memory_usable,
)
from hiermpi.errors import UserError
from hiermpi.hierarchy.topology import block_bounds
from hiermpi.model.kernels import load_kernels

SLICE_UNIT = LINE // 4
"""Slices begin on cache lines, so that no two ranks write to the same one."""

logger = logging.getLogger("hiermpi")


class SharedReduction:
    """Sums and broadcasts through node-shared memory. Collective over the hierarchy, like its methods.

    Args:
        comms: the hierarchy.
        size: elements of the gradient and parameter vectors.
        dtype: of the gradients: float32, or int64 for fixed point.

    Raises:
        UserError: on every rank of a node that cannot have the memory.
    """

    name = "shared"
    keeps_gradients = True

    def __init__(self, comms: Communicators, size: int, dtype: DTypeLike = np.float32) -> None:
        self.comms = comms
        node = comms.node
        self._leaders = comms.world.Split(0 if node.rank == 0 else MPI.UNDEFINED, comms.rank)
        self._joins = self._leaders != MPI.COMM_NULL and self._leaders.size > 1
        """Whether this rank speaks for its node to others."""
        stride = -(-size // SLICE_UNIT) * SLICE_UNIT
        barrier_bytes = -(-NodeBarrier.nbytes(node.size) // LINE) * LINE
        width = np.dtype(dtype).itemsize
        sums_at = barrier_bytes + 4 * stride
        memory = NodeMemory(node, sums_at + width * stride * (node.size + 1), comms.waiter)
        self._barrier = NodeBarrier(memory, 0, node, comms.waiter)
        self._parameters = memory.array(barrier_bytes, (stride,), np.float32)
        self._total = memory.array(sums_at, (stride,), dtype)
        self._buffers = memory.array(sums_at + width * stride, (node.size, stride), dtype)
        self._size = size
        bounds = [unit * SLICE_UNIT for unit in block_bounds(stride // SLICE_UNIT, node.size)]
        self._slice = (bounds[node.rank], bounds[node.rank + 1])
        self._kernels = load_kernels()
        self._turn = 0

    def gradient_vector(self) -> NDArray:
        return self._buffers[self.comms.node.rank, : self._size]

    def parameter_vector(self) -> NDArray[np.float32]:
        return self._parameters[: self._size]

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Both behind the same two barriers."""
        boxes = self._next_mailboxes()
        boxes[self.comms.node.rank, : len(sums)] = sums
        self._barrier.wait()
        self._kernels.sum_buffers(self._total, self._buffers, *self._slice)
        if self.comms.node.rank == 0:
            sums[:] = boxes[:, : len(sums)].sum(axis=0)
        self._barrier.wait()
        total = self._total[: self._size]
        if self._joins:
            for vector in (sums, total):
                chunked(self.comms.waiter, vector, lambda chunk: ireduce_in_place(self._leaders, chunk))
        return total

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """The root's node has the parameters already; all others wait behind one barrier."""
        if self._joins:
            chunked(self.comms.waiter, verdict, self._leaders.Ibcast)
            if verdict[0]:
                chunked(self.comms.waiter, parameters, self._leaders.Ibcast)
        boxes = self._next_mailboxes()
        if self.comms.node.rank == 0:
            boxes[0, : len(verdict)] = verdict
        self._barrier.wait()
        verdict[:] = boxes[0, : len(verdict)]

    def free(self) -> None:
        if self._leaders != MPI.COMM_NULL:
            self._leaders.Free()

    def _next_mailboxes(self) -> NDArray[np.float64]:
        """Two sets take turns: a set is written again only after a barrier that all its readers have reached."""
        self._turn = 1 - self._turn
        return self._barrier.mailboxes[self._turn]


def make_reduction(kind: str, comms: Communicators, size: int, dtype: DTypeLike = np.float32) -> Reduction:
    """The reduction called ``kind`` in the configuration, for ``size`` elements, the gradients being of ``dtype``.

    ``auto`` is ``shared`` where ranks share a node, else ``tree``. Where shared memory cannot be had, ``tree`` takes
    its place, and the log says so. Collective over the hierarchy.
    """
    if kind == "flat":
        return FlatReduction(comms, size, dtype)
    alone = comms.topology.n_nodes == comms.size
    if kind == "tree" or (kind == "auto" and (alone or not shared_memory_usable())):
        return TreeReduction(comms, size, dtype)
    error, made = None, None
    try:
        if not shared_memory_usable():
            raise UserError("this processor or system does not have what node-shared sums rely on")
        made = SharedReduction(comms, size, dtype)
    except UserError as caught:
        error = caught
    try:
        agree(comms.world, error, comms.waiter)
    except UserError as caught:
        if comms.rank == 0:
            logger.warning("%s; hierarchy.reduction = tree is used instead", caught)
        return TreeReduction(comms, size, dtype)
    assert made is not None
    return made
