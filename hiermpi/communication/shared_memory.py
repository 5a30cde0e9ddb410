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
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

import hiermpi.kernels
from hiermpi.communication.agreement import agree, broadcast_object
from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UserError
from hiermpi.kernels.memory import ALIGNMENT, address_of, built_library

LINE = ALIGNMENT
KERNELS = Path(hiermpi.kernels.__file__).parent
MAILBOX_DOUBLES = 16
LONGEST_KERNEL_SLEEP_NS = 1_000_000_000
"""Where the kernel wakes the rank: bounded, so that stalls are seen. Signals end the sleep."""
GATE_SPIN_NS = 300_000
"""How long a rank looks at a gate, giving the core away after each look, before it sleeps; only where its last wait
there was shorter. 13 ranks on two cores sum and hand down 10,000 floats in 0.10 ms so, in 0.15 with 50 us."""
ORDERED_STORES = ("x86_64", "AMD64", "i686")
"""Processors on which other cores see a core's stores in their order: gates that poll rely on it."""


class NodeMemory:
    """Shared memory of ``nbytes``, zeroed. Collective over ``node``.

    Args:
        node: the ranks that share memory.
        nbytes: size.
        waiter: for the waits.
        used: ranges of it, (start, stop), that memory is taken for; all of it by default.

    Raises:
        UserError: on every rank of ``node``, where it cannot be had.
    """

    def __init__(
        self, node: MPI.Comm, nbytes: int, waiter: Waiter, used: Sequence[tuple[int, int]] | None = None
    ) -> None:
        descriptor, error = -1, None
        ranges = [(0, nbytes)] if used is None else used
        place: tuple[int, int] | None = None
        try:
            if node.rank == 0:
                descriptor = os.memfd_create("hiermpi")
                os.ftruncate(descriptor, nbytes)
                for start, stop in ranges:
                    os.posix_fallocate(descriptor, start, stop - start)
                place = (os.getpid(), descriptor)
        except OSError as caught:
            needed = sum(stop - start for start, stop in ranges)
            error = UserError(f"no {needed:,} bytes of shared memory on this node: {caught.strerror}")
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


class GateState(ctypes.Structure):
    """A gate as node.c sees it from one rank."""

    _fields_ = (
        ("word", ctypes.c_void_p),
        ("members", ctypes.c_uint32),
        ("round", ctypes.c_uint32),
        ("joins", ctypes.c_int64),
        ("spin", ctypes.c_int64),
        ("sleep", ctypes.c_int64),
        ("expected", ctypes.c_int64),
    )


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
        self.library = memory.library
        self.waiter = waiter
        self.joins = memory.rank in members
        self.state = GateState(address_of(lines), len(members), 0, self.joins, GATE_SPIN_NS, LONGEST_KERNEL_SLEEP_NS, 0)
        self.at = ctypes.addressof(self.state)
        """Where node.c finds the gate."""
        self._arrivals = lines[:, 0]
        self._own = members.index(memory.rank) if self.joins else -1

    @staticmethod
    def nbytes(members: int) -> int:
        """Bytes needed for so many members, in whole cache lines."""
        return members * LINE

    def arrive(self) -> None:
        """Begin the next round: a member arrives, any other rank just counts it."""
        if self.library is not None:
            self.library.arrive(self.at)
            return
        self.state.round += 1
        if self.joins:
            self._arrivals[self._own] = self.state.round

    def wait(self) -> None:
        """Return when all members have arrived for this rank's round."""
        library = self.library
        if library is None:
            self.waiter.wait_until(lambda: int(self._arrivals.min()) >= self.state.round)
        else:
            self.waiter.wait_asleep(library.passed, self.at, self.waiter.slept_at)

    def meet(self) -> None:
        """A barrier of the members."""
        self.arrive()
        self.wait()


class Mailboxes:
    """A few numbers from each rank of a node, for all of it, through a gate. Two sets take turns.

    A set is written again only after a gate that all who read it have reached: the next round of this one, or another
    that they pass between its rounds.

    Args:
        memory: holds :meth:`nbytes` bytes of it from ``offset`` on.
        offset: where.
        gate: of all ranks of the node. It may have rounds besides.
        teller: the rank of the node whose numbers :meth:`tell` tells.
    """

    def __init__(self, memory: NodeMemory, offset: int, gate: Gate, teller: int = 0) -> None:
        self._boxes = memory.array(offset, (2, memory.size, MAILBOX_DOUBLES), np.float64)
        self._rank, self._size, self._library = memory.rank, memory.size, memory.library
        self._gate, self._waiter = gate, gate.waiter
        self._at = gate.at, gate.waiter.slept_at
        self._first = [address_of(boxes) for boxes in self._boxes]
        self._own = [address_of(boxes[memory.rank]) for boxes in self._boxes]
        self._told = [address_of(boxes[teller]) for boxes in self._boxes]
        self._teller = teller
        self._turn = 0

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes needed for ``size`` ranks."""
        return 2 * size * MAILBOX_DOUBLES * 8

    def offer(self, values: NDArray[np.float64]) -> None:
        """Turn to the other set, put this rank's numbers there, and arrive. Waits for the round before."""
        self._turn = turn = 1 - self._turn
        if self._library is None:
            self._gate.wait()
            self._boxes[turn, self._rank, : len(values)] = values
            self._gate.arrive()
        else:
            self._waiter.wait_asleep(self._library.offer, *self._at, self._own[turn], address_of(values), len(values))

    def sum(self, values: NDArray[np.float64]) -> None:
        """When all have arrived, take the sum of the numbers of all ranks, added in their order."""
        if self._library is None:
            self._gate.wait()
            values[:] = self._boxes[self._turn, :, : len(values)].sum(axis=0)
        else:
            arguments = (address_of(values), self._first[self._turn], self._size, len(values), MAILBOX_DOUBLES)
            self._waiter.wait_asleep(self._library.collect, *self._at, *arguments)

    def tell(self, values: NDArray[np.float64]) -> None:
        """Turn to the other set, and give every rank the teller's numbers. A barrier."""
        self._turn = turn = 1 - self._turn
        library, teller, n = self._library, self._teller, len(values)
        mine = self._rank == teller
        if library is None:
            if mine:
                self._boxes[turn, teller, :n] = values
            self._gate.meet()
            values[:] = self._boxes[turn, teller, :n]
        elif not library.tell(*self._at, address_of(values), self._told[turn], n, mine):
            self._waiter.wait_asleep(library.take, *self._at, address_of(values), self._told[turn], n)


@cache
def node_library() -> ctypes.CDLL | None:
    """What node.c was compiled to; None where it was not, or cannot be used."""
    library = built_library(KERNELS, "_gates")
    if library is None or not library.usable():
        return None
    address, number = (ctypes.c_void_p,), (ctypes.c_long,)
    library.arrive.argtypes = address
    library.passed.argtypes = address * 2
    library.offer.argtypes = library.take.argtypes = address * 4 + number
    library.collect.argtypes = address * 4 + number * 3
    library.tell.argtypes = address * 4 + number * 2
    library.deal_rows.argtypes = address * 5 + number * 3
    word = (ctypes.c_uint32,)
    library.ask_turn.argtypes = address * 2 + word
    library.begin_turn.argtypes, library.begin_turn.restype = address * 3 + word * 2, ctypes.c_long
    library.end_turn.argtypes = address + word * 3
    for function in (library.arrive, library.deal_rows, library.ask_turn, library.end_turn):
        function.restype = None
    return library


def shared_memory_usable() -> bool:
    """Whether this platform has what gates and the memory rely on."""
    return platform.machine() in ORDERED_STORES and hasattr(os, "memfd_create")
