"""This module defines reductions: the memory of a step's vectors, and the sums over the ranks.

    gradient = (sum over ranks of their gradient SUMS) / (sum over ranks of their target TOKENS)

A reduction forms only the sums, each part of the vector at its owner (:mod:`hiermpi.hierarchy.ownership`). The division
happens once, where the optimizer steps. A rank with no sequence takes part with zeros.

The package has the reductions ``shared`` (:mod:`hiermpi.communication.shared_reduction`), ``tree`` and ``flat``
(:mod:`hiermpi.communication.tree_reduction`). The setting ``hierarchy.reduction = my_module:Ring`` chooses one from
outside: a class that derives from :class:`Reduction`, whose docstring says what it must do.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import InFlight, Waiter
from hiermpi.hierarchy.ownership import Ownership, Span
from hiermpi.kernels.memory import aligned_zeros, lazy_zeros

CHUNK_BYTES = 1 << 19
"""The most bytes of a message: unsegmented algorithms of MPI libraries pipeline poorly, and counts stay small."""
CHUNKS_IN_FLIGHT = 8
"""The most operations of a pipeline that are pending at once."""
SENDS = 16
"""The most sends of :func:`spread_pieces`, and of sums by messages, that are pending at once."""

Piece = tuple[NDArray, int]
"""A part of a vector with the rank to which its sum goes, or from which the part comes."""


@dataclass(frozen=True)
class Vectors:
    """The types, slots and names of a reduction's vectors, which all have the length ``ownership.size``."""

    gradients: DTypeLike = np.float32
    """The element type of the gradients: float32, or int64 where they are summed in fixed point."""
    slots: int = 1
    """The number of copies of parameters and state: 2 where a step reads one and writes the other."""
    state: tuple[str, ...] = ("m", "v")
    """The names of the vectors that the optimizer's rule keeps."""


class Reduction:
    """A reduction sums over all ranks at the owners, and gives the owners' parameters to every rank.

    To write your own, derive from this class and override :meth:`reduce`. All else is implemented here with memory of
    this rank alone and messages over the communicators. Override more methods where your way is faster. Your own
    constructor must take the same three arguments and pass them on to this one.

    **The ranks.** ``self.comms`` has the communicators: ``world`` (all ranks; rank 0 is the root), ``control`` (the
    root and the first rank of each group; ask ``comms.in_control`` first), ``group`` (the ranks of a group; ask
    ``comms.in_group`` first) and ``node`` (the ranks that share memory). ``comms.topology`` tells which rank is
    where.

    **The owners.** The optimizer updates each element of the parameters on one rank, its owner. Owners are numbered as
    the ranks of ``control``: ``self.ownership.spans`` lists ``(start, stop, owner)`` over the whole vector, and
    ``self.ownership.ranks[owner]`` is an owner's rank in ``world``. With ``optimizer.placement = root`` the root owns
    everything.

    **A step.** All ranks call, in this order, ``reduce``, then ``exchange`` where ``ownership.shared_out``, then
    ``broadcast``. Ranks that *decide* (``self.decides``) see in the sums whether the step can be taken, and pass
    the same verdict to ``broadcast``. ``share`` and ``sum_everywhere`` are called between steps. Every rank of
    ``world`` calls each of these, so that you may use collective operations of any communicator.

    **Messages.** Start nonblocking operations and wait with ``self.comms.waiter.wait(request, ...)``: it sleeps where
    ranks share cores, keeps the account of waiting, and ends a run that hangs. :meth:`in_chunks` does an operation on a
    long vector in messages of a good size; :meth:`send_and_receive` sends and receives at once, as a ring does.

    Args:
        comms: The communicators of the hierarchy.
        ownership: The owner of each part of the vectors.
        vectors: The types, slots and names of the vectors.
    """

    name = "flat"
    """The name of the reduction in logs and reports."""
    keeps_gradients = False
    """Whether :meth:`reduce` leaves every rank's own gradient unchanged."""
    shares_memory = False
    """Whether the ranks of a node share one copy of parameters and gradients: then the vectors passed to the methods
    are always those that :meth:`gradient_vector` and :meth:`parameter_slots` return, the same at every call."""

    def __init__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> None:
        self.comms = comms
        self.ownership = ownership
        self.vectors = vectors
        self.decides = ownership.number(comms.rank) is not None
        """Whether this rank decides on a step: every rank that owns something does, and the root does unless the
        reduction can broadcast from an owner."""

    @classmethod
    def usable(cls, comms: Communicators) -> bool:  # noqa: ARG003
        """Tell whether a timed choice should try this reduction on these ranks; all ranks must agree."""
        return True

    def gradient_vector(self) -> NDArray:
        """Return this rank's zeroed (size,) gradient of type ``vectors.gradients``, in memory that is summed fast."""
        return aligned_zeros(self.ownership.size, self.vectors.gradients)

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        """Return ``vectors.slots`` zeroed vectors for the parameters, in memory that is broadcast fast."""
        return [aligned_zeros(self.ownership.size, np.float32) for _ in range(self.vectors.slots)]

    def state_slots(self) -> list[dict[str, NDArray[np.float32]]]:
        """Return ``vectors.slots`` sets of zeroed vectors for the optimizer's state, by name.

        They have the length of the parameters, but take memory only where they are written. Where the ranks of a node
        share memory and there are two slots, the vectors outlive their owner.
        """
        return private_state(self.ownership.size, self.vectors)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the gradients, over all ranks; this is collective over the world.

        Args:
            sums: The numbers of this rank, at most 16; afterwards they are the sums over the ranks on every rank that
                decides.
            gradients: The gradients of this rank: the vector of :meth:`gradient_vector`, or one like it where memory is
                not shared.

        Returns:
            A vector like ``gradients``, or that one itself, that has the sum at least in the parts that this rank
            owns. All else in it is scratch, and so are the gradients unless ``keeps_gradients``. Gradients are written
            again only after the next collective call.
        """
        for vector in (sums, gradients):
            self.in_chunks(vector, partial(self.comms.world.Iallreduce, MPI.IN_PLACE))
        return gradients

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """Give every rank that decides the numbers of each owner's blocks; this is collective over the world.

        Args:
            values: (k, blocks) The numbers of the blocks, with k at most 2, on ranks that decide: those of other
                owners' blocks must be zero, and afterwards all are filled. None on all other ranks.
        """
        if values is not None and self.comms.in_control:
            # Each number is zero on all ranks but one, so the sum is the number.
            self.in_chunks(values.reshape(-1), partial(self.comms.control.Iallreduce, MPI.IN_PLACE))

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every rank the verdict and, unless its first number is 0, all parameters.

        This is collective over the world.

        Args:
            verdict: A few numbers, the same on all ranks that decide; afterwards they are the same on every rank.
            parameters: A slot of the parameters, to which this rank has written what it owns; afterwards it is complete
                on every rank.
        """
        world, waiter = self.comms.world, self.comms.waiter
        waiter.wait(world.Ibcast(verdict))
        if verdict[0]:
            ranks = self.ownership.ranks
            spans = [span._replace(owner=ranks[span.owner]) for span in self.ownership.spans]
            broadcast_spans(waiter, world, parameters, spans)

    def share(self, parameters: NDArray[np.float32]) -> None:
        """Give every rank the root's parameters, whatever their owners; this is collective over the world.

        Args:
            parameters: A slot of the parameters, complete at the root before and on every rank afterwards.
        """
        hand_down(self.comms, parameters)

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        """Sum at most 16 numbers over all ranks, in place on every rank; this is collective over the world."""
        allreduce_small(self.comms, values)

    def free(self) -> None:
        """Free the communicators that the reduction made; this is collective over the world."""

    def in_chunks(self, vector: NDArray, start: Callable[[NDArray], MPI.Request]) -> None:
        """Do a nonblocking operation on every chunk of a vector, a few at a time.

        Args:
            vector: The vector, 1-D and contiguous.
            start: The function that starts the operation on a view of a part of it, such as ``comm.Iallreduce`` or
                ``comm.Ibcast``.
        """
        chunked(self.comms.waiter, vector, start)

    def send_and_receive(self, sent: NDArray, to: int, received: NDArray, source: int) -> None:
        """Send one vector to a rank and receive another at the same time.

        Args:
            sent: The vector to send, 1-D and contiguous.
            to: The rank of ``world`` that receives it.
            received: The vector to fill, 1-D and contiguous, as long as what ``source`` sends.
            source: The rank of ``world`` from which it comes.
        """
        world = self.comms.world
        receives = [partial(world.Irecv, chunk, source) for chunk in chunks(received)]
        sends = [partial(world.Isend, chunk, to) for chunk in chunks(sent)]
        # Receives and sends alternate: with all sends first, two long ones could wait for each other.
        both = chain.from_iterable(zip_longest(receives, sends))
        pipelined(self.comms.waiter, (start for start in both if start is not None))


def private_state(size: int, vectors: Vectors) -> list[dict[str, NDArray[np.float32]]]:
    """Make slots of zeroed state in this rank's own memory, which is taken only where they are written."""
    return [{name: lazy_zeros(size, np.float32) for name in vectors.state} for _ in range(vectors.slots)]


def hand_down(comms: Communicators, vector: NDArray) -> None:
    """Give every rank the root's ``vector``, over control, then over group; this is collective over the hierarchy."""
    for comm in comms.levels_down():
        chunked(comms.waiter, vector, comm.Ibcast)


def allreduce_small(comms: Communicators, values: NDArray[np.float64]) -> None:
    """Sum a few numbers over all ranks, in place on every rank; this is collective over the world."""
    comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, values))


def broadcast_spans(waiter: Waiter, comm: MPI.Comm, vector: NDArray, spans: Iterable[Span]) -> None:
    """Give every rank of ``comm`` each span of a vector from its owner; this is collective over ``comm``.

    Args:
        waiter: The waiter of this rank.
        comm: The communicator, whose ranks are the owners' numbers.
        vector: The vector; owners have written their spans of it.
        spans: The spans with their owners.
    """
    pieces = list(span_chunks(vector, spans))
    if len({owner for _, owner in pieces}) > 1:
        spread_pieces(waiter, comm, pieces)
    else:
        pipelined(waiter, (partial(comm.Ibcast, chunk, owner) for chunk, owner in pieces))


def spread_pieces(waiter: Waiter, comm: MPI.Comm, pieces: Iterable[Piece]) -> None:
    """Send each piece directly from the rank that has it to all others; this is collective over ``comm``.

    Args:
        waiter: The waiter of this rank.
        comm: The communicator.
        pieces: The pieces with the rank that has each, in the same order on every rank.
    """
    flying = InFlight(waiter, SENDS)
    for piece, root in pieces:
        if root != comm.rank:
            flying.start(partial(comm.Irecv, piece, root))
            continue
        for other in range(comm.size):
            if other != root:
                flying.start(partial(comm.Isend, piece, other))
    flying.finish()


def chunked(waiter: Waiter, vector: NDArray, start: Callable[[NDArray], MPI.Request]) -> None:
    """Do a nonblocking operation on every chunk of a vector, a few at a time.

    Args:
        waiter: The waiter of this rank.
        vector: The vector, 1-D and contiguous.
        start: The function that starts the operation on a view of a part of it.
    """
    pipelined(waiter, (partial(start, chunk) for chunk in chunks(vector)))


def pipelined(waiter: Waiter, starts: Iterable[Callable[[], MPI.Request]]) -> None:
    """Do the operations that the functions in ``starts`` start, a few at a time, in their order."""
    flying = InFlight(waiter, CHUNKS_IN_FLIGHT)
    for start in starts:
        flying.start(start)
    flying.finish()


def span_chunks(vector: NDArray, spans: Iterable[Span]) -> Iterator[Piece]:
    """Yield views that cover the ``spans`` in chunks of at most :data:`CHUNK_BYTES`, with the owner of each."""
    for span in spans:
        for chunk in chunks(vector[span.start : span.stop]):
            yield chunk, span.owner


def chunks(vector: NDArray) -> list[NDArray]:
    """Return views that cover ``vector`` in chunks of at most :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // vector.itemsize)
    return [vector[start : start + step] for start in range(0, len(vector), step)]
