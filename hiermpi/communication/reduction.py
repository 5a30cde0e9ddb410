"""Sums up the tree, parameters down it.

    gradient = (sum over leaves of their gradient SUMS) / (sum over leaves of their target TOKENS)

Here only the sums are formed, each part of the vector where its owner is (:mod:`hiermpi.hierarchy.ownership`); the
division happens once, where the optimizer steps. A rank with no sequence takes part with zeros.

- ``tree``: Reduce on each group communicator, then on the control communicator to each part's owner.
- ``shared``: in memory that the ranks of a node share (:mod:`hiermpi.communication.shared_reduction`).
- ``flat``: one Allreduce over the world; the reference that every other form must equal.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.tree_messages import spread_pieces, sum_pieces
from hiermpi.communication.waiting import InFlight, Waiter
from hiermpi.hierarchy.ownership import Ownership, Span
from hiermpi.kernels.memory import aligned_zeros, lazy_zeros
from hiermpi.optimizer.adamw import Moments

CHUNK_BYTES = 1 << 19
"""Messages are cut to this size: unsegmented algorithms of MPI libraries pipeline poorly, and counts stay small."""
CHUNKS_IN_FLIGHT = 8


class Reduction(Protocol):
    """A way to sum a vector over all ranks at its owners, and to give every rank the owners' vector.

    All methods are collective over the hierarchy, but for those that return memory.
    """

    name: str
    ownership: Ownership
    keeps_gradients: bool
    """Whether :meth:`reduce` leaves every rank's own gradient as it was."""
    decides: bool
    """Whether this rank comes to the verdict on a step: every rank that owns something does, and the root unless one of
    them can tell the others."""

    def gradient_vector(self) -> NDArray:
        """This rank's zeroed gradient, in the memory where it is summed best."""

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        """The slots of the parameters, in the memory where they are broadcast best."""

    def moment_slots(self) -> list[Moments]:
        """Zeroed slots of the moments. Where a node's ranks share memory and slots are two, they outlive their owner.

        They have the length of the parameters, but take memory only for what is written.
        """

    def share(self, parameters: NDArray[np.float32]) -> None:
        """Give every rank the root's vector in a slot of the parameters, whoever owns it."""

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the vector of :meth:`gradient_vector`, over the ranks.

        Leaves the sum of the numbers in the ``sums`` of every rank that decides, and returns a vector that holds the
        other sum at least in the parts that this rank owns; all else is scratch. Gradients may be written again after
        the next call that is collective.
        """

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        """Sum a few numbers over all ranks, in place on every rank."""

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """Give every rank that decides what each owner found for its blocks.

        Args:
            values: (k, blocks), k at most 2, on ranks that decide: filled where this rank owns the block, zero
                elsewhere, and filled altogether afterwards. None on all other ranks.
        """

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every rank the verdict and, where its first number is not 0, each owner's part of the parameters.

        Args:
            verdict: the same on all ranks that decide, and on every rank afterwards.
            parameters: a slot of them.
        """

    def free(self) -> None:
        """Free what was made."""


class TreeReduction:
    """Level by level, as the ranks are organised.

    Args:
        comms: the hierarchy.
        ownership: of the vectors.
        dtype: of the gradients: float32, or int64 for fixed point.
        slots: of parameters and moments.
    """

    name = "tree"
    keeps_gradients = False

    def __init__(
        self, comms: Communicators, ownership: Ownership, dtype: DTypeLike = np.float32, slots: int = 1
    ) -> None:
        self.comms = comms
        self.ownership = ownership
        self.decides = ownership.number(comms.rank) is not None
        self.dtype = dtype
        self.slots = slots

    def gradient_vector(self) -> NDArray:
        return aligned_zeros(self.ownership.size, self.dtype)

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        return [aligned_zeros(self.ownership.size, np.float32) for _ in range(self.slots)]

    def moment_slots(self) -> list[Moments]:
        return private_moments(self.ownership.size, self.slots)

    def share(self, parameters: NDArray[np.float32]) -> None:
        hand_down(self.comms, parameters)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        comms = self.comms
        if comms.group != MPI.COMM_NULL:
            pieces = [(chunk, 0) for chunk in chunks(gradients)]
            sum_pieces(comms.waiter, comms.group, [(sums, 0)])
            sum_pieces(comms.waiter, comms.group, pieces)
        if comms.control != MPI.COMM_NULL:
            if self.ownership.shared_out:
                comms.waiter.wait(comms.control.Iallreduce(MPI.IN_PLACE, sums))
            else:
                sum_pieces(comms.waiter, comms.control, [(sums, 0)])
            reduce_spans(comms.waiter, comms.control, gradients, self.ownership.spans)
        return gradients

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        allreduce_small(self.comms, values)

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        exchange_on_control(self.comms, values)

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        comms = self.comms
        hand_down(comms, verdict)
        if not verdict[0]:
            return
        if comms.control != MPI.COMM_NULL:
            broadcast_spans(comms.waiter, comms.control, parameters, self.ownership.spans)
        if comms.group != MPI.COMM_NULL:
            chunked(comms.waiter, parameters, comms.group.Ibcast)

    def free(self) -> None:
        """There is nothing to free."""


class FlatReduction(TreeReduction):
    """One Allreduce over the world, one Bcast from each owner."""

    name = "flat"

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        for vector in (sums, gradients):
            chunked(self.comms.waiter, vector, partial(self.comms.world.Iallreduce, MPI.IN_PLACE))
        return gradients

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        world, waiter = self.comms.world, self.comms.waiter
        waiter.wait(world.Ibcast(verdict))
        if verdict[0]:
            ranks = self.ownership.ranks
            spans = [span._replace(owner=ranks[span.owner]) for span in self.ownership.spans]
            broadcast_spans(waiter, world, parameters, spans)


def private_moments(size: int, slots: int) -> list[Moments]:
    """Slots of zeroed moments in this rank's own memory, which is taken where they are written."""
    return [Moments(lazy_zeros(size, np.float32), lazy_zeros(size, np.float32)) for _ in range(slots)]


def hand_down(comms: Communicators, vector: NDArray) -> None:
    """Give every rank the root's ``vector``: control, then group. Collective over the hierarchy."""
    for comm in comms.levels_down():
        chunked(comms.waiter, vector, comm.Ibcast)


def exchange_on_control(comms: Communicators, values: NDArray[np.float64] | None) -> None:
    """:meth:`Reduction.exchange` by messages: what is zero elsewhere adds up to what it is. Collective over control."""
    if values is not None and comms.control != MPI.COMM_NULL:
        chunked(comms.waiter, values.reshape(-1), partial(comms.control.Iallreduce, MPI.IN_PLACE))


def reduce_spans(waiter: Waiter, comm: MPI.Comm, vector: NDArray, spans: Iterable[Span]) -> None:
    """Leave the sum over ``comm`` of each span at its owner there. Collective over ``comm``."""
    sum_pieces(waiter, comm, list(span_chunks(vector, spans)))


def broadcast_spans(waiter: Waiter, comm: MPI.Comm, vector: NDArray, spans: Iterable[Span]) -> None:
    """Give every rank of ``comm`` each span of its owner there. Collective over ``comm``."""
    pieces = list(span_chunks(vector, spans))
    if len({owner for _, owner in pieces}) > 1:
        spread_pieces(waiter, comm, pieces)
    else:
        pipelined(waiter, (partial(comm.Ibcast, chunk, owner) for chunk, owner in pieces))


def chunked(waiter: Waiter, vector: NDArray, start: Callable[[NDArray], MPI.Request]) -> None:
    """Do what ``start`` starts on every chunk of ``vector``, a few at a time."""
    pipelined(waiter, (partial(start, chunk) for chunk in chunks(vector)))


def pipelined(waiter: Waiter, starts: Iterable[Callable[[], MPI.Request]]) -> None:
    """Do what all of ``starts`` start, a few at a time, in their order."""
    flying = InFlight(waiter, CHUNKS_IN_FLIGHT)
    for start in starts:
        flying.start(start)
    flying.finish()


def span_chunks(vector: NDArray, spans: Iterable[Span]) -> Iterator[tuple[NDArray, int]]:
    """Views that cover the ``spans`` in pieces of at most :data:`CHUNK_BYTES`, and the owner of each."""
    for span in spans:
        for chunk in chunks(vector[span.start : span.stop]):
            yield chunk, span.owner


def chunks(vector: NDArray) -> list[NDArray]:
    """Views that cover ``vector`` in pieces of at most :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // vector.itemsize)
    return [vector[start : start + step] for start in range(0, len(vector), step)]


def allreduce_small(comms: Communicators, values: NDArray[np.float64]) -> None:
    """Sum a few numbers over all ranks, in place on every rank. Collective over the world."""
    comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, values))
