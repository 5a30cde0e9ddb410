"""What a reduction is: the memory of a step's vectors, and the sums over the ranks.

    gradient = (sum over ranks of their gradient SUMS) / (sum over ranks of their target TOKENS)

A reduction forms only the sums, each part of the vector at its owner (:mod:`hiermpi.hierarchy.ownership`). The division
happens once, where the optimizer steps. A rank with no sequence takes part with zeros.

The reductions of the package are ``shared`` (:mod:`hiermpi.communication.shared_reduction`), ``tree`` and ``flat``
(:mod:`hiermpi.communication.tree_reduction`). ``hierarchy.reduction = my_module:Ring`` takes one from outside: a class
that derives from :class:`Reduction`, whose docstring says what it must do.
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
"""Messages are cut to this size: unsegmented algorithms of MPI libraries pipeline poorly, and counts stay small."""
CHUNKS_IN_FLIGHT = 8
SENDS = 16
"""How many messages of :func:`spread_pieces` and sums by messages are on their way out at once."""

Piece = tuple[NDArray, int]
"""A part of a vector, and the rank that its sum is for, or that it comes from."""


@dataclass(frozen=True)
class Vectors:
    """The vectors that a reduction holds and sums; all have the length of the parameters, ``ownership.size``."""

    gradients: DTypeLike = np.float32
    """Type of the gradients: float32, or int64 where they are summed in fixed point."""
    slots: int = 1
    """How many copies of parameters and state there are: 2 where a step reads one and writes the other."""
    state: tuple[str, ...] = ("m", "v")
    """Names of the vectors that the optimizer's rule keeps."""


class Reduction:
    """Sums over all ranks at the owners, and the owners' parameters on every rank.

    To write one of your own, derive from this class and override :meth:`reduce`. All else is here already: memory of
    this rank's own, and messages over the communicators. Override more of it where your way is faster. A constructor of
    your own takes the same three arguments and passes them on to this one.

    **The ranks.** ``self.comms`` has the communicators: ``world`` (all ranks; rank 0 is the root), ``control`` (the
    root and the first rank of each group; ask ``comms.in_control`` first), ``group`` (the ranks of a group; ask
    ``comms.in_group`` first) and ``node`` (the ranks that share memory). Who is where says ``comms.topology``.

    **The owners.** The optimizer updates each element of the parameters on one rank, its owner. Owners are numbered as
    the ranks of ``control``: ``self.ownership.spans`` lists ``(start, stop, owner)`` over the whole vector, and
    ``self.ownership.ranks[owner]`` is an owner's rank in ``world``. With ``optimizer.placement = root`` the root owns
    everything.

    **A step.** All ranks call, in this order, ``reduce``, then ``exchange`` where ``ownership.shared_out``, then
    ``broadcast``. Ranks that *decide* (``self.decides``) learn from the sums whether the step can be taken, and bring
    the same verdict to ``broadcast``. ``share`` and ``sum_everywhere`` are called between steps. Every rank of
    ``world`` calls each of these, so that you may use collective operations of any communicator.

    **Messages.** Start nonblocking operations and wait with ``self.comms.waiter.wait(request, ...)``: it sleeps where
    ranks share cores, keeps the account of waiting, and ends a run that hangs. :meth:`in_chunks` does an operation on a
    long vector in messages of a good size, :meth:`send_and_receive` two at the same time, as a ring does.

    Args:
        comms: the communicators of the hierarchy.
        ownership: the owner of each part of the vectors.
        vectors: types, slots and names of the vectors.
    """

    name = "flat"
    """What logs and reports call it."""
    keeps_gradients = False
    """Whether :meth:`reduce` leaves every rank's own gradient as it was."""
    shares_memory = False
    """Whether the ranks of a node have one copy of parameters and gradients: then the vectors passed to the methods are
    always those that :meth:`gradient_vector` and :meth:`parameter_slots` return, the same at every call."""

    def __init__(self, comms: Communicators, ownership: Ownership, vectors: Vectors) -> None:
        self.comms = comms
        self.ownership = ownership
        self.vectors = vectors
        self.decides = ownership.number(comms.rank) is not None
        """Whether this rank comes to the verdict on a step: every rank that owns something does, and the root unless
        one of them can tell the others."""

    @classmethod
    def usable(cls, comms: Communicators) -> bool:  # noqa: ARG003
        """Tell whether a timed choice should try this reduction on these ranks; the same on every rank."""
        return True

    def gradient_vector(self) -> NDArray:
        """Return this rank's zeroed gradient, (size,) of ``vectors.gradients``, in the memory that is summed best."""
        return aligned_zeros(self.ownership.size, self.vectors.gradients)

    def parameter_slots(self) -> list[NDArray[np.float32]]:
        """Return ``vectors.slots`` zeroed vectors for the parameters, in the memory that is broadcast best."""
        return [aligned_zeros(self.ownership.size, np.float32) for _ in range(self.vectors.slots)]

    def state_slots(self) -> list[dict[str, NDArray[np.float32]]]:
        """Return ``vectors.slots`` sets of zeroed vectors for the optimizer's state, by name.

        They have the length of the parameters, but take memory only where they are written. Where a node's ranks share
        memory and slots are two, they outlive their owner.
        """
        return private_state(self.ownership.size, self.vectors)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the gradients, over all ranks. Collective over the world.

        Args:
            sums: this rank's numbers, at most 16; afterwards, on every rank that decides, their sum over the ranks.
            gradients: this rank's: the vector of :meth:`gradient_vector`, or one like it where memory is not shared.

        Returns:
            A vector like ``gradients``, or that one itself, that holds the sum at least in the parts that this rank
            owns. All else in it is scratch, and so are the gradients unless ``keeps_gradients``. Gradients are written
            again only after the next collective call.
        """
        for vector in (sums, gradients):
            self.in_chunks(vector, partial(self.comms.world.Iallreduce, MPI.IN_PLACE))
        return gradients

    def exchange(self, values: NDArray[np.float64] | None) -> None:
        """Give every rank that decides what each owner found for its blocks. Collective over the ranks that decide.

        Args:
            values: (k, blocks), k at most 2, on ranks that decide: filled where this rank owns the block and zero
                elsewhere; filled altogether afterwards. None on all other ranks.
        """
        if values is not None and self.comms.in_control:
            # What is zero elsewhere adds up to what it is.
            self.in_chunks(values.reshape(-1), partial(self.comms.control.Iallreduce, MPI.IN_PLACE))

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every rank the verdict and, unless its first number is 0, all parameters. Collective over the world.

        Args:
            verdict: a few numbers, the same on all ranks that decide; afterwards the same on every rank.
            parameters: a slot of them, of which this rank has written what it owns; afterwards whole on every rank.
        """
        world, waiter = self.comms.world, self.comms.waiter
        waiter.wait(world.Ibcast(verdict))
        if verdict[0]:
            ranks = self.ownership.ranks
            spans = [span._replace(owner=ranks[span.owner]) for span in self.ownership.spans]
            broadcast_spans(waiter, world, parameters, spans)

    def share(self, parameters: NDArray[np.float32]) -> None:
        """Give every rank the root's parameters, whoever owns them. Collective over the world.

        Args:
            parameters: a slot of them, whole at the root beforehand and on every rank afterwards.
        """
        hand_down(self.comms, parameters)

    def sum_everywhere(self, values: NDArray[np.float64]) -> None:
        """Sum a few numbers (at most 16) over all ranks, in place on every rank. Collective over the world."""
        allreduce_small(self.comms, values)

    def free(self) -> None:
        """Free the communicators that were made. Collective over the world."""

    def in_chunks(self, vector: NDArray, start: Callable[[NDArray], MPI.Request]) -> None:
        """Do a nonblocking operation on every chunk of a vector, a few at a time.

        Args:
            vector: 1-D, contiguous.
            start: starts the operation on a view of a part of it, such as ``comm.Iallreduce`` or ``comm.Ibcast``.
        """
        chunked(self.comms.waiter, vector, start)

    def send_and_receive(self, sent: NDArray, to: int, received: NDArray, source: int) -> None:
        """Send one vector to a rank and receive another at the same time.

        Args:
            sent: 1-D, contiguous.
            to: the rank of ``world`` that receives it.
            received: 1-D, contiguous, as long as what ``source`` sends.
            source: the rank of ``world`` that it comes from.
        """
        world = self.comms.world
        receives = [partial(world.Irecv, chunk, source) for chunk in chunks(received)]
        sends = [partial(world.Isend, chunk, to) for chunk in chunks(sent)]
        # In turns: were all sends first, two long ones could wait for each other.
        both = chain.from_iterable(zip_longest(receives, sends))
        pipelined(self.comms.waiter, (start for start in both if start is not None))


def private_state(size: int, vectors: Vectors) -> list[dict[str, NDArray[np.float32]]]:
    """Make slots of zeroed state in this rank's own memory, which is taken where they are written."""
    return [{name: lazy_zeros(size, np.float32) for name in vectors.state} for _ in range(vectors.slots)]


def hand_down(comms: Communicators, vector: NDArray) -> None:
    """Give every rank the root's ``vector``: over control, then over group. Collective over the hierarchy."""
    for comm in comms.levels_down():
        chunked(comms.waiter, vector, comm.Ibcast)


def allreduce_small(comms: Communicators, values: NDArray[np.float64]) -> None:
    """Sum a few numbers over all ranks, in place on every rank. Collective over the world."""
    comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, values))


def broadcast_spans(waiter: Waiter, comm: MPI.Comm, vector: NDArray, spans: Iterable[Span]) -> None:
    """Give every rank of ``comm`` each span from its owner there. Collective over ``comm``."""
    pieces = list(span_chunks(vector, spans))
    if len({owner for _, owner in pieces}) > 1:
        spread_pieces(waiter, comm, pieces)
    else:
        pipelined(waiter, (partial(comm.Ibcast, chunk, owner) for chunk, owner in pieces))


def spread_pieces(waiter: Waiter, comm: MPI.Comm, pieces: Iterable[Piece]) -> None:
    """Give every rank of ``comm`` each piece from the rank that has it, directly. Collective over ``comm``."""
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
    """Do the operation that ``start`` starts on every chunk of ``vector``, a few at a time."""
    pipelined(waiter, (partial(start, chunk) for chunk in chunks(vector)))


def pipelined(waiter: Waiter, starts: Iterable[Callable[[], MPI.Request]]) -> None:
    """Do the operations that ``starts`` start, a few at a time, in their order."""
    flying = InFlight(waiter, CHUNKS_IN_FLIGHT)
    for start in starts:
        flying.start(start)
    flying.finish()


def span_chunks(vector: NDArray, spans: Iterable[Span]) -> Iterator[Piece]:
    """Yield views that cover the ``spans`` in pieces of at most :data:`CHUNK_BYTES`, and the owner of each."""
    for span in spans:
        for chunk in chunks(vector[span.start : span.stop]):
            yield chunk, span.owner


def chunks(vector: NDArray) -> list[NDArray]:
    """Return views that cover ``vector`` in pieces of at most :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // vector.itemsize)
    return [vector[start : start + step] for start in range(0, len(vector), step)]
