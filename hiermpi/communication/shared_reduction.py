"""Sums in memory that a node's ranks share: level 1 is the node, level 2 joins the nodes.

Every rank of a node sums its own slices over the gradients of all leaves there, in the order of the ranks, into a
vector of the node. Where there are several nodes, the ranks at place k of each then carry the k-th part of that vector
between them, each part to the node of its owner, chunk by chunk: as many communicators of leaders as the smallest node
has ranks. There is one copy of the parameters per node, so a broadcast inside a node is a barrier. Groups decide
routing and ownership, the machine decides the sum.
"""

import os
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import broadcast_spans, exchange_on_control, private_moments, reduce_spans
from hiermpi.communication.shared_memory import Gate, Mailboxes, NodeMemory
from hiermpi.hierarchy.ownership import Ownership, Span, lanes, owners_here, spans_of, summing
from hiermpi.kernels import load_kernels
from hiermpi.kernels.memory import lazy_zeros, offsets_of, round_up
from hiermpi.optimizer.adamw import Moments

EXCHANGED_ROWS = 2


class SharedReduction:
    """Sums and broadcasts through node-shared memory. Collective over the hierarchy, like its methods.

    Args:
        comms: the hierarchy.
        ownership: of the gradient and parameter vectors.
        dtype: of the gradients: float32, or int64 for fixed point.
        slots: of parameters and moments. Where there are two, the moments of a node's owners lie in its memory too, so
            that both outlive any rank.

    Raises:
        UserError: on every rank of a node that cannot have the memory.
    """

    name = "shared"
    keeps_gradients = True

    def __init__(
        self, comms: Communicators, ownership: Ownership, dtype: DTypeLike = np.float32, slots: int = 1
    ) -> None:
        self.comms = comms
        self.ownership = ownership
        node, topology, size = comms.node, comms.topology, ownership.size
        self._several = topology.n_nodes > 1
        parts = lanes(ownership, topology) if self._several else []
        carries = node.rank < len(parts)
        self._leaders = comms.world.Split(node.rank if carries else MPI.UNDEFINED, topology.nodes[comms.rank])
        self._lane = parts[node.rank] if carries else []
        """What this rank carries between the nodes."""
        place, stride, width = topology.nodes[comms.rank], round_up(4 * size) // 4, np.dtype(dtype).itemsize
        owned_by = owners_here(ownership, topology, place)
        summed_by = summing(ownership, topology, place, width, os.cpu_count() or 1)
        leaves = [rank for rank in topology.ranks_of_node[place] if topology.is_leaf(rank)]
        n_buffers = max(len(leaves), 1)  # where nobody computes, zeros
        owners = sorted(set(owned_by[owned_by >= 0].tolist()))
        self._sums_its_own = not self._several and bool((summed_by == owned_by).all())
        """Whether every owner sums what it owns, so that it need not wait for others' sums."""
        self._slices = [span for span in spans_of(ownership.bounds, summed_by) if span.owner == node.rank]
        number = ownership.number(comms.rank)
        self._blocks = np.empty(0, np.int64) if number is None else ownership.blocks_of(number)
        self.decides = number is not None if self._several else len(self._blocks) > 0
        self._waits_for_sums = self._several or self.decides or bool(self._slices)
        members, n_blocks = range(node.size), len(ownership.owners)
        summers = sorted(set(summed_by[summed_by >= 0].tolist()))
        gates = [members, members, summers, owners]
        pieces = [*(Gate.nbytes(len(some)) for some in gates), *[Mailboxes.nbytes(node.size)] * 2]
        pieces += [8 * EXCHANGED_ROWS * n_blocks, 4 * stride * slots, width * stride, width * stride * n_buffers]
        *offsets, end = offsets_of(*pieces)
        memory = NodeMemory(node, end, comms.waiter)
        made = [Gate(memory, offset, some, comms.waiter) for offset, some in zip(offsets, gates, strict=False)]
        self._all, self._computed, self._summed, self._owners = made
        """Of all ranks: done with what came before, done with its gradients; of those who sum, and who own."""
        self._sums = Mailboxes(memory, offsets[4], self._computed)
        self._told = Mailboxes(memory, offsets[5], self._all, teller=0 if self._several else owners[0])
        self._exchanged = memory.array(offsets[6], (EXCHANGED_ROWS, n_blocks), np.float64)
        self._parameters = memory.array(offsets[7], (slots, stride), np.float32)
        self._total = memory.array(offsets[8], (stride,), dtype)
        self._sum = self._total[:size]
        self._buffers = memory.array(offsets[9], (n_buffers, stride), dtype)
        self._gradients = lazy_zeros(size, dtype)  # of a rank that never computes
        if comms.rank in leaves:
            self._gradients = self._buffers[leaves.index(comms.rank), :size]
        self._size = size
        owned = spans_of(ownership.bounds, owned_by)
        self._moments = private_moments(size, 1) if slots == 1 else node_moments(comms, size, slots, owned)
        self._kernels = load_kernels()

    def gradient_vector(self) -> NDArray:
        return self._gradients

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        return [slot[: self._size] for slot in self._parameters]

    def moment_slots(self) -> list[Moments]:
        return self._moments

    def share(self, parameters: NDArray[np.float32]) -> None:
        self._all.meet()
        if self._several:
            if self._leaders != MPI.COMM_NULL:
                from_root = [span._replace(owner=0) for span in self._lane]
                broadcast_spans(self.comms.waiter, self._leaders, parameters, from_root)
            self._all.meet()

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """On one node nobody waits for sums but their owners; who sums nothing does not even wait for gradients.

        A root that only coordinates is one of those: it gives its numbers and hears the verdict.
        """
        self._sums.offer(sums)
        if not self._waits_for_sums:
            return self._sum
        self._sums.sum(sums)
        for start, stop, _ in self._slices:
            self.sum_part(start, stop)
        if not self._sums_its_own:
            self._summed.arrive()
            if self._several or self.decides:
                self._summed.wait()
        if self._several:
            if self._leaders != MPI.COMM_NULL:
                self.comms.waiter.wait(self._leaders.Iallreduce(MPI.IN_PLACE, sums))
                reduce_spans(self.comms.waiter, self._leaders, self._sum, self._lane)
            self._told.tell(sums)
        return self._sum

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        self._told.offer(values)
        self._told.sum(values)
        if self._several:
            if self._leaders != MPI.COMM_NULL and self.comms.node.rank == 0:
                self.comms.waiter.wait(self._leaders.Iallreduce(MPI.IN_PLACE, values))
            self._told.tell(values)

    def sum_part(self, start: int, stop: int) -> None:
        """Sum these elements over the node's gradients, waiting for nobody."""
        self._kernels.sum_buffers(self._total, self._buffers, start, stop)

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """A barrier of the owners on one node, messages between them on several."""
        if self._several:
            exchange_on_control(self.comms, values)
            return
        if values is not None:
            self._exchanged[: len(values), self._blocks] = values[:, self._blocks]
            self._owners.meet()
            values[:] = self._exchanged[: len(values)]

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """The owners' nodes have the parameters already; one barrier on one node."""
        if self._several:
            self._told.tell(verdict)  # true on the root's node; and all owners have written
            if self._leaders != MPI.COMM_NULL:
                self.comms.waiter.wait(self._leaders.Ibcast(verdict))
                if verdict[0]:
                    broadcast_spans(self.comms.waiter, self._leaders, parameters, self._lane)
        self._told.tell(verdict)

    def free(self) -> None:
        if self._leaders != MPI.COMM_NULL:
            self._leaders.Free()


def node_moments(comms: Communicators, size: int, slots: int, owned: Sequence[Span]) -> list[Moments]:
    """Slots of zeroed moments that the ranks of a node share. Collective over the node; raises like its memory.

    Args:
        comms: the hierarchy.
        size: of a vector.
        slots: how many.
        owned: what the owners on this node have of it: memory is taken for that alone.
    """
    stride = round_up(4 * size)
    firsts = [stride * row for row in range(2 * slots)]
    used = [(first + 4 * start, first + 4 * stop) for first in firsts for start, stop, _ in owned]
    memory = NodeMemory(comms.node, 2 * slots * stride, comms.waiter, used)
    rows = [memory.array(first, (size,), np.float32) for first in firsts]
    return [Moments(m, v) for m, v in zip(rows[::2], rows[1::2], strict=True)]
