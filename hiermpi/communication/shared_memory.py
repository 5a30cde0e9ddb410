"""Memory that the ranks of a node share, and a barrier made of it.

An anonymous file (memfd) that one rank makes and the others open through /proc: it is not bounded by the size of
/dev/shm, nothing can be left behind, and, unlike an MPI window, it outlives the communicator it was made with and is
unmapped without the others. The space is allocated at once, so that too little memory is an error and not a SIGBUS.
"""

import ctypes
import mmap
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.objects import agree, broadcast_object
from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UserError
from hiermpi.native import built_library

LINE = 64
WORD_LINES = 2
"""Cache lines of the two words of node.c."""
MAILBOX_DOUBLES = 16
ORDERED_STORES = ("x86_64", "AMD64", "i686")
"""Processors on which other cores see a core's stores in their order: the barrier that polls relies on it."""


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

    def array(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """A view of the memory from byte ``offset`` on."""
        count = int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)


class NodeBarrier:
    """A barrier of the ranks of a node, and mailboxes beside it, in a piece of shared memory. Collective over ``node``.

    Ranks sleep in the kernel until the last one arrives where node.c is built on every rank. Elsewhere each counts its
    arrivals in a cache line of its own and polls the others' counts.

    Args:
        memory: holds :meth:`nbytes` bytes of it from ``offset`` on.
        offset: where.
        node: the ranks.
        waiter: for the waits.
    """

    def __init__(self, memory: NodeMemory, offset: int, node: MPI.Comm, waiter: Waiter) -> None:
        size = node.size
        lines = size + WORD_LINES
        self._words = memory.array(offset, (WORD_LINES * LINE // 4,), np.uint32)
        self._arrivals = memory.array(offset + WORD_LINES * LINE, (size, LINE // 8), np.int64)[:, 0]
        self.mailboxes = memory.array(offset + lines * LINE, (2, size, MAILBOX_DOUBLES), np.float64)
        self._rank, self._size = node.rank, size
        self._waiter = waiter
        self._count = 0
        library = node_library()
        built = np.array([library is not None], np.int64)
        waiter.wait(node.Iallreduce(MPI.IN_PLACE, built, op=MPI.MIN))
        self._library = library if built[0] else None
        self._at = self._words.ctypes.data

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes needed for ``size`` ranks, in whole cache lines."""
        return (size + WORD_LINES) * LINE + 2 * size * MAILBOX_DOUBLES * 8

    def wait(self) -> None:
        """Return when every rank of the node is here."""
        library = self._library
        if library is None:
            self._count += 1
            self._arrivals[self._rank] = self._count
            self._waiter.wait_until(self._all_here)
            return
        before = library.arrive(self._at, self._size)
        self._waiter.wait_asleep(lambda seconds: bool(library.passed(self._at, before, int(1e9 * seconds))))

    def _all_here(self) -> bool:
        return int(self._arrivals.min()) >= self._count


@cache
def node_library() -> ctypes.CDLL | None:
    """What node.c was compiled to; None where it was not, or cannot be used."""
    library = built_library(Path(__file__).parent, "_node")
    if library is None or not library.usable():
        return None
    library.arrive.argtypes, library.arrive.restype = [ctypes.c_void_p, ctypes.c_uint32], ctypes.c_uint32
    library.passed.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_long]
    return library


def shared_memory_usable() -> bool:
    """Whether this platform has what the barrier and the memory rely on."""
    return platform.machine() in ORDERED_STORES and hasattr(os, "memfd_create")
