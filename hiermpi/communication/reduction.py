"""Sums up the tree, parameters down it.

    gradient = (sum over leaves of their gradient SUMS) / (sum over leaves of their target TOKENS)

Here only the sums are formed; the division happens once, where the optimizer steps. A rank with no sequence takes
part with zeros.

- ``tree``: Reduce on each group communicator, then Reduce on the control communicator.
- ``shared``: in memory that the ranks of a node share (:mod:`hiermpi.communication.shared_reduction`).
- ``flat``: one Allreduce over the world; the reference that every other form must equal.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import Waiter
from hiermpi.model.parameters import aligned_zeros

CHUNK_BYTES = 1 << 17
"""Messages are cut to this size: unsegmented algorithms of MPI libraries pipeline poorly, and counts stay small."""
CHUNKS_IN_FLIGHT = 8


class Reduction(Protocol):
    """A way to sum a vector over all ranks at the root, and to give every rank the root's vector."""

    name: str
    keeps_gradients: bool
    """Whether :meth:`reduce` leaves every rank's own gradient as it was."""

    def gradient_vector(self) -> NDArray:
        """This rank's zeroed gradient, in the memory where it is summed best."""

    def parameter_vector(self) -> NDArray[np.float32]:
        """The parameters, in the memory where they are broadcast best."""

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        """Sum a few numbers, and the vector of :meth:`gradient_vector`, over the ranks. Collective over the hierarchy.

        Leaves the sum of the numbers in the root's ``sums``, and returns the vector that holds the other sum there;
        on other ranks both are scratch.
        """

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        """Give every rank the root's numbers and, where the first is not 0, its :meth:`parameter_vector`.

        Collective over the hierarchy.
        """

    def free(self) -> None:
        """Free what was made. Collective over the hierarchy."""


class TreeReduction:
    """Level by level, as the ranks are organised.

    Args:
        comms: the hierarchy.
        size: elements of the gradient and parameter vectors.
        dtype: of the gradients: float32, or int64 for fixed point.
    """

    name = "tree"
    keeps_gradients = False

    def __init__(self, comms: Communicators, size: int = 0, dtype: DTypeLike = np.float32) -> None:
        self.comms = comms
        self.size = size
        self.dtype = dtype

    def gradient_vector(self) -> NDArray:
        return aligned_zeros(self.size, self.dtype)

    def parameter_vector(self) -> NDArray[np.float32]:
        return aligned_zeros(self.size, np.float32)

    def sum_up(self, vector: NDArray) -> None:
        """Leave the sum over ranks of any ``vector`` at the root. Collective over the hierarchy."""
        # Group, then control.
        for comm in self.comms.levels_up():
            chunked(self.comms.waiter, vector, partial(ireduce_in_place, comm))

    def hand_down(self, vector: NDArray) -> None:
        """Give every rank the root's ``vector``, whatever it is. Collective over the hierarchy."""
        # Control, then group.
        for comm in self.comms.levels_down():
            chunked(self.comms.waiter, vector, comm.Ibcast)

    def reduce(self, sums: NDArray[np.float64], gradients: NDArray) -> NDArray:
        self.sum_up(sums)
        self.sum_up(gradients)
        return gradients

    def broadcast(self, verdict: NDArray[np.float64], parameters: NDArray[np.float32]) -> None:
        self.hand_down(verdict)
        if verdict[0]:
            self.hand_down(parameters)

    def free(self) -> None:
        """There is nothing to free."""


class FlatReduction(TreeReduction):
    """One Allreduce over the world, one Bcast."""

    name = "flat"

    def sum_up(self, vector: NDArray) -> None:
        chunked(self.comms.waiter, vector, lambda chunk: self.comms.world.Iallreduce(MPI.IN_PLACE, chunk))

    def hand_down(self, vector: NDArray) -> None:
        chunked(self.comms.waiter, vector, self.comms.world.Ibcast)


def ireduce_in_place(comm: MPI.Comm, chunk: NDArray) -> MPI.Request:
    """Start a sum to rank 0 of ``comm``, in place there."""
    return comm.Ireduce(MPI.IN_PLACE, chunk) if comm.rank == 0 else comm.Ireduce(chunk, None)


def chunked(waiter: Waiter, vector: NDArray, start: Callable[[NDArray], MPI.Request]) -> None:
    """Do what ``start`` starts on every chunk of ``vector``, a few at a time."""
    pieces = chunks(vector)
    for first in range(0, len(pieces), CHUNKS_IN_FLIGHT):
        waiter.wait_all([start(chunk) for chunk in pieces[first : first + CHUNKS_IN_FLIGHT]])


def chunks(vector: NDArray) -> list[NDArray]:
    """Views that cover ``vector`` in pieces of at most :data:`CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // vector.itemsize)
    return [vector[start : start + step] for start in range(0, len(vector), step)]


def allreduce_small(comms: Communicators, values: NDArray[np.float64]) -> None:
    """Sum a few numbers over all ranks, in place on every rank. Collective over the world."""
    comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, values))
