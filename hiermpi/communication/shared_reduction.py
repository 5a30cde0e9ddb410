"""This module sums in memory that a node's ranks share: level 1 is the node, level 2 joins the nodes.

Every rank of a node sums its own slices over the gradients of all ranks there that compute, in the order of the ranks,
into a vector of the node (:class:`SharedReduction`). On one node the sum is then complete (:class:`OneNodeReduction`).
Where there are several nodes (:class:`SeveralNodesReduction`), the k-th ranks of all nodes then carry the k-th part of
that vector between the nodes, each part to the node of its owner, chunk by chunk. There is one copy of the parameters
per node, so a broadcast inside a node is a barrier. Routing and ownership depend on the groups, the way of summing
depends on the nodes.
"""

import os
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.agreement import agreed
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.node import NodeMemory, shared_memory_usable
from hiermpi.communication.reduction import Reduction, Vectors, broadcast_spans, private_state
from hiermpi.communication.tree_reduction import reduce_spans
from hiermpi.errors import UserError
from hiermpi.hierarchy.ownership import Ownership, Span, lanes, owners_here, spans_of, summing
from hiermpi.kernels import load_kernels
from hiermpi.kernels.gates import gate_bytes, mailbox_bytes, make_gate, make_mailboxes
from hiermpi.kernels.memory import lazy_zeros, offsets_of, round_up

EXCHANGED_ROWS = 2
"""The most rows of values that :meth:`Reduction.exchange` gets."""


class SharedReduction(Reduction):
    """The base of reductions with vectors in memory of the node: it has the sum inside the node.

    Construction is collective over the node.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part of the vectors.
        vectors: The types, slots and names of the vectors. Where there are two slots, the state of a node's owners is
            in its memory too, so that both slots outlive any rank.
        teller: The rank of the node whose verdict the others take.

    Raises:
        UserError: The memory is not available; every rank of the node raises it.
    """

    name = "shared"
    keeps_gradients = True
    shares_memory = True

    def __init__(self, comms: Communicators, ownership: Ownership, vectors: Vectors, teller: int) -> None:
        super().__init__(comms, ownership, vectors)
        node, topology, size, dtype = comms.node, comms.topology, ownership.size, np.dtype(vectors.gradients)
        here, stride = topology.nodes[comms.rank], round_up(4 * size) // 4
        leaves = [rank for rank in topology.ranks_of_node[here] if topology.is_leaf(rank)]
        n_buffers = max(len(leaves), 1)  # zeros where no rank computes
        self._owned_by = owners_here(ownership, topology, here)
        self._summed_by = summing(ownership, topology, here, dtype.itemsize, os.cpu_count() or 1)
        self._slices = [span for span in spans_of(ownership.bounds, self._summed_by) if span.owner == node.rank]
        members, summers = range(node.size), ranks_in(self._summed_by)
        *offsets, end = offsets_of(
            *(gate_bytes(len(some)) for some in (members, members, summers)),
            *[mailbox_bytes(node.size)] * 2,
            4 * stride * vectors.slots,
            dtype.itemsize * stride,
            dtype.itemsize * stride * n_buffers,
        )
        memory = NodeMemory(node, end, comms.waiter)
        self._all = make_gate(memory, offsets[0], members, comms.waiter)
        """The gate at which all ranks have finished what came before."""
        self._computed = make_gate(memory, offsets[1], members, comms.waiter)
        """The gate at which all ranks have their gradients."""
        self._summed = make_gate(memory, offsets[2], summers, comms.waiter)
        """The gate at which all ranks that sum something have done so."""
        self._sums = make_mailboxes(memory, offsets[3], self._computed)
        self._verdicts = make_mailboxes(memory, offsets[4], self._all, teller=teller)
        self._parameters = memory.array(offsets[5], (vectors.slots, stride), np.float32)[:, :size]
        self._total = memory.array(offsets[6], (stride,), dtype)
        self._sum = self._total[:size]
        self._buffers = memory.array(offsets[7], (n_buffers, stride), dtype)
        self._gradients = lazy_zeros(size, dtype)  # for a rank that never computes
        if comms.rank in leaves:
            self._gradients = self._buffers[leaves.index(comms.rank), :size]
        owned = spans_of(ownership.bounds, self._owned_by)
        alone = vectors.slots == 1
        self._state = private_state(size, vectors) if alone else node_state(comms, size, vectors, owned)
        self._kernels = load_kernels()

    @classmethod
    def usable(cls, comms: Communicators) -> bool:
        """Tell whether any two ranks share memory, so that a timed choice should try this reduction."""
        return comms.topology.n_nodes < comms.size

    def gradient_vector(self) -> NDArray:
        """Return this rank's gradient in the node's memory; on a rank that never computes, zeros of its own."""
        return self._gradients

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        """Return the node's slots of the parameters."""
        return list(self._parameters)

    def state_slots(self) -> list[dict[str, NDArray[np.float32]]]:
        """Return the slots of the state: those of the node where there are two, else those of this rank."""
        return self._state

    def sum_part(self, start: int, stop: int) -> None:
        """Sum the elements from ``start`` to ``stop`` over the node's gradients, without waiting."""
        self._kernels.sum_buffers(self._total, self._buffers, start, stop)

    def sum_slices(self, sums: NDArray[np.float64]) -> None:
        """Fill ``sums`` with the sum of the numbers that the node's ranks offered, and sum this rank's slices."""
        self._sums.sum(sums)
        for start, stop, _ in self._slices:
            self.sum_part(start, stop)

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        """Sum a few numbers over the ranks of the node, in place on each of them."""
        self._verdicts.offer(values)
        self._verdicts.sum(values)


class OneNodeReduction(SharedReduction):
    """The reduction where all ranks share memory; construction is collective over the hierarchy.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part of the vectors.
        vectors: The types, slots and names of the vectors.
    """

    def __init__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> None:
        owners = ranks_in(owners_here(ownership, comms.topology, 0))
        super().__init__(comms, ownership, vectors, teller=owners[0])
        self._sums_its_own = bool((self._summed_by == self._owned_by).all())
        """Whether every owner sums what it owns, so that it need not wait for the sums of other ranks."""
        self._blocks = np.flatnonzero(self._owned_by == comms.node.rank)
        self.decides = len(self._blocks) > 0
        self._waits_for_sums = self.decides or bool(self._slices)
        n_blocks = len(ownership.owners)
        *offsets, end = offsets_of(gate_bytes(len(owners)), 8 * EXCHANGED_ROWS * n_blocks)
        memory = NodeMemory(comms.node, end, comms.waiter)
        self._owners = make_gate(memory, offsets[0], owners, comms.waiter)
        self._exchanged = memory.array(offsets[1], (EXCHANGED_ROWS, n_blocks), np.float64)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the gradients, over all ranks; see :meth:`Reduction.reduce`.

        Only owners wait for sums. A rank that sums nothing does not even wait for gradients: a root that only
        coordinates offers its numbers and later takes the verdict.
        """
        self._sums.offer(sums)
        if not self._waits_for_sums:
            return self._sum
        self.sum_slices(sums)
        if not self._sums_its_own:
            self._summed.arrive()
            if self.decides:
                self._summed.wait()
        return self._sum

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """Exchange the numbers of the owners' blocks, a barrier of the owners; see :meth:`Reduction.exchange`."""
        if values is not None:
            self._exchanged[: len(values), self._blocks] = values[:, self._blocks]
            self._owners.meet()
            values[:] = self._exchanged[: len(values)]

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every rank the verdict; all see the parameters already, so this is a barrier.

        See :meth:`Reduction.broadcast`.
        """
        self._verdicts.tell(verdict)

    def share(self, parameters: NDArray[np.float32]) -> None:
        """Wait for all ranks, which share the parameters already; see :meth:`Reduction.share`."""
        self._all.meet()


class SeveralNodesReduction(SharedReduction):
    """The reduction for several nodes: sums inside each node, and messages between the nodes.

    There are as many communicators between the nodes as the smallest node has ranks; each carries a part of the vector.
    Construction is collective over the hierarchy.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part of the vectors.
        vectors: The types, slots and names of the vectors.
    """

    def __init__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> None:
        parts, rank = lanes(ownership, comms.topology), comms.node.rank
        self._carries = rank < len(parts)
        """Whether this rank carries a part between the nodes."""
        here = comms.topology.nodes[comms.rank]
        self._between = comms.world.Split(rank if self._carries else MPI.UNDEFINED, here)
        """The communicator of the ranks that carry the same part, in the order of the nodes."""
        self._part = parts[rank] if self._carries else []
        """The spans of the part that this rank carries; here a span's owner is a node."""
        super().__init__(comms, ownership, vectors, teller=0)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the gradients, over all ranks; see :meth:`Reduction.reduce`."""
        self._sums.offer(sums)
        self.sum_slices(sums)
        self._summed.meet()
        if self._carries:
            self.comms.waiter.wait(self._between.Iallreduce(MPI.IN_PLACE, sums))
            reduce_spans(self.comms.waiter, self._between, self._sum, self._part)
        self._verdicts.tell(sums)
        return self._sum

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every node the verdict and the parameters of owners on other nodes; see :meth:`Reduction.broadcast`."""
        self._verdicts.tell(verdict)  # valid on the root's node; and all owners have written
        if self._carries:
            self.comms.waiter.wait(self._between.Ibcast(verdict))
            if verdict[0]:
                broadcast_spans(self.comms.waiter, self._between, parameters, self._part)
        self._verdicts.tell(verdict)

    def share(self, parameters: NDArray[np.float32]) -> None:
        """Give every node the root's parameters; see :meth:`Reduction.share`."""
        self._all.meet()
        if self._carries:
            from_root = [span._replace(owner=0) for span in self._part]
            broadcast_spans(self.comms.waiter, self._between, parameters, from_root)
        self._all.meet()

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        """Sum a few numbers over all ranks, in place on every rank; see :meth:`Reduction.sum_everywhere`."""
        super().sum_everywhere(values)
        if self.comms.node.rank == 0:
            self.comms.waiter.wait(self._between.Iallreduce(MPI.IN_PLACE, values))
        self._verdicts.tell(values)

    def free(self) -> None:
        """Free the communicators between the nodes."""
        if self._carries:
            self._between.Free()


class SharedByTopology:
    """The maker of the reduction ``shared``, which has one form for one node and another for several."""

    usable = SharedReduction.usable

    def __call__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> SharedReduction:
        """Make the reduction; this is collective over the hierarchy.

        Args:
            comms: The communicators of the hierarchy.
            ownership: The owner of each part of the vectors.
            vectors: The types, slots and names of the vectors.

        Raises:
            UserError: Ranks cannot share memory on this platform; every rank raises it.
        """
        with agreed(comms.world, comms.waiter):
            if not shared_memory_usable():
                raise UserError("this processor or system does not have what node-shared sums rely on")
        form = OneNodeReduction if comms.topology.n_nodes == 1 else SeveralNodesReduction
        return form(comms, ownership, vectors)


REDUCTION = SharedByTopology()


def ranks_in(ranks: NDArray[np.int64]) -> list[int]:
    """Return the distinct ranks of a node in ``ranks``, in order; those below 0 are on other nodes."""
    return sorted(set(ranks[ranks >= 0].tolist()))


def node_state(
    comms: Communicators, size: int, vectors: Vectors, owned: Sequence[Span]
) -> list[dict[str, NDArray[np.float32]]]:
    """Make slots of zeroed state that the ranks of a node share; this is collective over the node.

    Args:
        comms: The communicators of the hierarchy.
        size: The number of elements of a vector.
        vectors: The number of slots and the names of the vectors.
        owned: The spans that the owners on this node have; memory is allocated for them alone.

    Raises:
        UserError: The memory is not available; every rank of the node raises it.
    """
    stride, names = round_up(4 * size), vectors.state
    firsts = [stride * row for row in range(len(names) * vectors.slots)]
    used = [(first + 4 * start, first + 4 * stop) for first in firsts for start, stop, _ in owned]
    if not names:
        return [{} for _ in range(vectors.slots)]
    memory = NodeMemory(comms.node, stride * len(firsts), comms.waiter, used)
    rows = [memory.array(first, (size,), np.float32) for first in firsts]
    return [dict(zip(names, rows[at : at + len(names)], strict=True)) for at in range(0, len(rows), len(names))]
