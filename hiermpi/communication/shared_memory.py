"""Memory that the ranks of a node share; gates and mailboxes made of it.

An anonymous file (memfd) that one rank makes and the others open through /proc: it is not bounded by the size of
/dev/shm, nothing can be left behind, and, unlike an MPI window, it outlives the communicator it was made with and is
unmapped without the others. The space is allocated at once, so that too little memory is an error and not a SIGBUS.
"""

import ctypes
import mmap
import os
import platform
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.objects import agree, broadcast_object
from hiermpi.communication.waiting import Expected, Waiter
from hiermpi.errors import UserError
from hiermpi.native import at, built_library

LINE = 64
MAILBOX_DOUBLES = 16
ORDERED_STORES = ("x86_64", "AMD64", "i686")
"""Processors on which other cores see a core's stores in their order: gates that poll rely on it."""


def laid_out(*nbytes: int) -> list[int]:
    """Offsets of pieces of so many bytes one after the other in whole cache lines, and where the last one ends."""
    return [0, *accumulate(map(whole_lines, nbytes))]


def whole_lines(nbytes: int) -> int:
    """``nbytes`` rounded up to cache lines."""
    return -(-nbytes // LINE) * LINE


class NodeMemory:
    """Shared memory of ``nbytes``, zeroed. Collective over ``node``.

    Args:
        node: the ranks that share memory.
        nbytes: size.
        waiter: for the waits.

    Raises:
        UserError: on every rank of ``node``, where it cannot be had.
    """

    def __init__(self, node: MPI.Comm, nbytes: int, waiter: Waiter) -> None:
        descriptor, error = -1, None
        place: tuple[int, int] | None = None
        try:
            if node.rank == 0:
                descriptor = os.memfd_create("hiermpi")
                os.posix_fallocate(descriptor, 0, nbytes)
                place = (os.getpid(), descriptor)
        except OSError as caught:
            error = UserError(f"no {nbytes:,} bytes of shared memory on this node: {caught.strerror}")
        agree(node, error, waiter)
        place = broadcast_object(node, place, waiter)
        try:
            if node.rank != 0 and place is not None:
                descriptor = os.open(f"/proc/{place[0]}/fd/{place[1]}", os.O_RDWR)
            self._map = mmap.mmap(descriptor, nbytes)
        except OSError as caught:
            error = UserError(f"the ranks of this node cannot open each other's memory: {caught.strerror}")
        agree(node, error, waiter)
        os.close(descriptor)
        library = node_library()
        built = np.array([library is not None], np.int64)
        waiter.wait(node.Iallreduce(MPI.IN_PLACE, built, op=MPI.MIN))
        self.library = library if built[0] else None
        """node.c, where every rank of the node has it."""
        self.rank, self.size = node.rank, node.size

    def array(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """A view of the memory from byte ``offset`` on."""
        count = int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)


class Gate:
    """Where ranks of a node wait until its members have all arrived, once a round.

    No member may arrive for a round before all have arrived for the one before it.

    Ranks sleep in the kernel where node.c is built on every rank. Elsewhere each member counts its arrivals in a cache
    line of its own, and who waits polls them.

    Args:
        memory: holds :meth:`nbytes` bytes of it from ``offset`` on.
        offset: where.
        members: the ranks of the node that arrive.
        waiter: for the waits.
    """

    def __init__(self, memory: NodeMemory, offset: int, members: Sequence[int], waiter: Waiter) -> None:
        lines = memory.array(offset, (len(members), LINE // 8), np.int64)
        self._library = memory.library
        self._at = at(lines)
        self._arrivals = lines[:, 0]
        self._members = len(members)
        self._own = members.index(memory.rank) if memory.rank in members else -1
        self._waiter = waiter
        self._round = 0
        self._waits = Expected()

    @staticmethod
    def nbytes(members: int) -> int:
        """Bytes needed for so many members, in whole cache lines."""
        return members * LINE

    def arrive(self) -> None:
        """Begin the next round: a member arrives, any other rank just counts it."""
        self._round += 1
        if self._own < 0:
            return
        if self._library is None:
            self._arrivals[self._own] = self._round
        else:
            self._library.arrive(self._at, self._target())

    def wait(self) -> None:
        """Return when all members have arrived for this rank's round."""
        library = self._library
        if library is None:
            self._waiter.wait_until(lambda: int(self._arrivals.min()) >= self._round)
        else:
            self._waiter.wait_asleep(library.reached, self._at, self._target(), self._waits)

    def meet(self) -> None:
        """A barrier of the members."""
        self.arrive()
        self.wait()

    def _target(self) -> int:
        return self._round * self._members & 0xFFFFFFFF


class Mailboxes:
    """A few numbers from each rank of a node, for all of it. Two sets take turns.

    A set is written again only after a gate that all who read it have reached.

    Args:
        memory: holds :meth:`nbytes` bytes of it from ``offset`` on.
        offset: where.
    """

    def __init__(self, memory: NodeMemory, offset: int) -> None:
        self._boxes = memory.array(offset, (2, memory.size, MAILBOX_DOUBLES), np.float64)
        self._rank, self._library = memory.rank, memory.library
        self._turn = 0

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes needed for ``size`` ranks."""
        return 2 * size * MAILBOX_DOUBLES * 8

    def put(self, values: NDArray[np.float64]) -> None:
        """Turn to the other set and put this rank's numbers there."""
        self.turn()
        self._boxes[self._turn, self._rank, : len(values)] = values

    def turn(self) -> None:
        """Turn to the other set."""
        self._turn = 1 - self._turn

    def get(self, values: NDArray[np.float64]) -> None:
        """Take the numbers of the node's first rank."""
        values[:] = self._boxes[self._turn, 0, : len(values)]

    def sum(self, values: NDArray[np.float64]) -> None:
        """Take the sum of the numbers of all ranks, added in their order."""
        boxes = self._boxes[self._turn]
        if self._library is None:
            values[:] = boxes[:, : len(values)].sum(axis=0)
        else:
            self._library.sum_boxes(at(values), at(boxes), len(boxes), len(values), MAILBOX_DOUBLES)


@cache
def node_library() -> ctypes.CDLL | None:
    """What node.c was compiled to; None where it was not, or cannot be used."""
    library = built_library(Path(__file__).parent, "_node")
    if library is None or not library.usable():
        return None
    address, number, word = ctypes.c_void_p, ctypes.c_long, ctypes.c_uint32
    library.arrive.argtypes, library.arrive.restype = [address, word], None
    library.reached.argtypes, library.reached.restype = [address, word, number, number], ctypes.c_int
    library.deal_rows.argtypes, library.deal_rows.restype = [*[address] * 5, *[number] * 3], None
    library.sum_boxes.argtypes, library.sum_boxes.restype = [*[address] * 2, *[number] * 3], None
    return library


def shared_memory_usable() -> bool:
    """Whether this platform has what gates and the memory rely on."""
    return platform.machine() in ORDERED_STORES and hasattr(os, "memfd_create")
