"""This module lets the ranks of a node wait for each other on words of shared memory: gates, mailboxes and a queue.

Gates and mailboxes have two forms. Where gates.c was built on every rank of the node, a rank sleeps in the kernel until
another wakes it. Elsewhere it polls, and there is no queue for compute slots. :attr:`Memory.sleeps` tells which form a
memory allows.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.kernels.library import CONSTANTS, load_library
from hiermpi.kernels.memory import address_of

LINE = CONSTANTS["LINE"]
"""The bytes of a cache line."""
MAILBOX_DOUBLES = 16
"""The most numbers that a mailbox holds."""
LONGEST_KERNEL_SLEEP_NS = 1_000_000_000
"""The longest sleep in the kernel, which signals end too: it is bounded so that stalls are seen."""
GATE_SPIN_NS = 300_000
"""The time for which a rank polls a gate, yielding the core after each poll, before it sleeps; it polls only where its
last wait there was shorter. 13 ranks on two cores sum and broadcast 10,000 floats in 0.10 ms with it, and in 0.15 ms
with 50 us."""


class Waits(Protocol):
    """The interface of a rank's waiter, which :class:`hiermpi.communication.waiting.Waiter` has."""

    slept_at: int
    """The address at which gates.c keeps account of its waits."""

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Poll ``ready`` and return when it is true."""

    def wait_asleep(self, done: Callable[..., Any], *arguments: int) -> None:
        """Call ``done`` until it returns true; it sleeps by itself."""


class Memory(Protocol):
    """The interface of memory that the ranks of a node share."""

    rank: int
    """This rank's number within the node."""
    size: int
    """The number of ranks of the node."""
    sleeps: bool
    """Whether all ranks of the node can sleep in the kernel."""

    def array(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """Return a view of the memory from byte ``offset`` on."""


@cache
def gates_library() -> ctypes.CDLL | None:
    """Return the library of gates.c; None where it was not built, or cannot be used on this system."""
    library = load_library("_gates")
    return library if library is not None and library.usable() else None


def can_sleep() -> bool:
    """Tell whether this rank can sleep in the kernel until another wakes it."""
    return gates_library() is not None


def gate_bytes(members: int) -> int:
    """Return the bytes that a gate of ``members`` ranks needs, in whole cache lines."""
    return members * LINE


def mailbox_bytes(size: int) -> int:
    """Return the bytes that the mailboxes of ``size`` ranks need."""
    return 2 * size * MAILBOX_DOUBLES * 8


class Gate(Protocol):
    """A gate at which ranks of a node wait until all its members have arrived, once a round.

    No member may arrive for a round before all members have arrived for the round before it.
    """

    def arrive(self) -> None:
        """Begin the next round; a member arrives for it, any other rank only counts it."""

    def wait(self) -> None:
        """Return when all members have arrived for this rank's round."""

    def meet(self) -> None:
        """Arrive and wait for all members, as at a barrier."""


def make_gate(memory: Memory, offset: int, members: Sequence[int], waiter: Waits) -> Gate:
    """Make a gate in shared memory.

    Args:
        memory: The zeroed memory of the gate, of which it takes :func:`gate_bytes` bytes.
        offset: The byte at which the gate begins.
        members: The ranks of the node that arrive.
        waiter: The waiter of this rank.
    """
    form = SleepingGate if memory.sleeps else PollingGate
    return form(memory, offset, members, waiter)


class GateState(ctypes.Structure):
    """The state of a gate as gates.c keeps it for one rank."""

    _fields_ = (
        ("word", ctypes.c_void_p),
        ("members", ctypes.c_uint32),
        ("round", ctypes.c_uint32),
        ("joins", ctypes.c_int64),
        ("spin", ctypes.c_int64),
        ("sleep", ctypes.c_int64),
        ("expected", ctypes.c_int64),
    )


class SleepingGate:
    """A gate whose waiters sleep in the kernel; see :func:`make_gate`."""

    def __init__(self, memory: Memory, offset: int, members: Sequence[int], waiter: Waits) -> None:
        lines = memory.array(offset, (len(members), LINE // 8), np.int64)
        joins = memory.rank in members
        self.library = required_library()
        self.waiter = waiter
        self.state = GateState(address_of(lines), len(members), 0, joins, GATE_SPIN_NS, LONGEST_KERNEL_SLEEP_NS, 0)
        self.at = ctypes.addressof(self.state)
        """The address of the gate for gates.c."""
        self._lines = lines  # keeps the memory alive

    def arrive(self) -> None:
        self.library.arrive(self.at)

    def wait(self) -> None:
        self.waiter.wait_asleep(self.library.passed, self.at, self.waiter.slept_at)

    def meet(self) -> None:
        self.arrive()
        self.wait()


class PollingGate:
    """A gate in which each member counts its arrivals in its own cache line, and waiting ranks poll all of them."""

    def __init__(self, memory: Memory, offset: int, members: Sequence[int], waiter: Waits) -> None:
        self.waiter = waiter
        self.round = 0
        self.arrivals = memory.array(offset, (len(members), LINE // 8), np.int64)[:, 0]
        self._own = members.index(memory.rank) if memory.rank in members else -1

    def arrive(self) -> None:
        self.round += 1
        if self._own >= 0:
            self.arrivals[self._own] = self.round

    def wait(self) -> None:
        self.waiter.wait_until(lambda: int(self.arrivals.min()) >= self.round)

    def meet(self) -> None:
        self.arrive()
        self.wait()


class Mailboxes(Protocol):
    """The mailboxes with which the ranks of a node exchange a few numbers through a gate of all its ranks.

    There are two sets of mailboxes, which are used alternately. A set is written again only after a gate that all its
    readers have reached: the next round of this one, or another that they pass between its rounds.
    """

    def offer(self, values: NDArray[np.float64]) -> None:
        """Wait for the previous round, put this rank's numbers into the other set, and arrive."""

    def sum(self, values: NDArray[np.float64]) -> None:
        """Wait for all ranks, and fill ``values`` with the sum of their numbers, added in the order of the ranks."""

    def tell(self, values: NDArray[np.float64]) -> None:
        """Fill ``values`` on every rank with the numbers of the telling rank, by the other set; this is a barrier."""


def make_mailboxes(memory: Memory, offset: int, gate: Gate, teller: int = 0) -> Mailboxes:
    """Make mailboxes in shared memory.

    Args:
        memory: The memory of the mailboxes, of which they take :func:`mailbox_bytes` bytes.
        offset: The byte at which the mailboxes begin.
        gate: A gate of all ranks of the node, in the same memory; it may have other rounds besides.
        teller: The rank of the node whose numbers :meth:`Mailboxes.tell` gives to all.
    """
    if isinstance(gate, SleepingGate):
        return SleepingMailboxes(memory, offset, gate, teller)
    return PollingMailboxes(memory, offset, gate, teller)


class SleepingMailboxes:
    """Mailboxes whose methods call gates.c once each; see :func:`make_mailboxes`."""

    def __init__(self, memory: Memory, offset: int, gate: SleepingGate, teller: int) -> None:
        boxes = memory.array(offset, (2, memory.size, MAILBOX_DOUBLES), np.float64)
        self._boxes = boxes  # keeps the memory alive
        self._size, self._library, self._waiter = memory.size, gate.library, gate.waiter
        self._at = gate.at, gate.waiter.slept_at
        self._first = [address_of(box) for box in boxes]
        self._own = [address_of(box[memory.rank]) for box in boxes]
        self._told = [address_of(box[teller]) for box in boxes]
        self._tells = memory.rank == teller
        self._turn = 0

    def offer(self, values: NDArray[np.float64]) -> None:
        self._turn = turn = 1 - self._turn
        self._waiter.wait_asleep(self._library.offer, *self._at, self._own[turn], address_of(values), len(values))

    def sum(self, values: NDArray[np.float64]) -> None:
        arguments = (address_of(values), self._first[self._turn], self._size, len(values), MAILBOX_DOUBLES)
        self._waiter.wait_asleep(self._library.collect, *self._at, *arguments)

    def tell(self, values: NDArray[np.float64]) -> None:
        self._turn = turn = 1 - self._turn
        numbers = (address_of(values), self._told[turn], len(values))
        if not self._library.tell(*self._at, *numbers, self._tells):
            self._waiter.wait_asleep(self._library.take, *self._at, *numbers)


class PollingMailboxes:
    """Mailboxes with a polling gate; see :func:`make_mailboxes`."""

    def __init__(self, memory: Memory, offset: int, gate: Gate, teller: int) -> None:
        self._boxes = memory.array(offset, (2, memory.size, MAILBOX_DOUBLES), np.float64)
        self._rank, self._teller, self._gate = memory.rank, teller, gate
        self._turn = 0

    def offer(self, values: NDArray[np.float64]) -> None:
        self._turn = 1 - self._turn
        self._gate.wait()
        self._boxes[self._turn, self._rank, : len(values)] = values
        self._gate.arrive()

    def sum(self, values: NDArray[np.float64]) -> None:
        self._gate.wait()
        values[:] = self._boxes[self._turn, :, : len(values)].sum(axis=0)

    def tell(self, values: NDArray[np.float64]) -> None:
        self._turn = 1 - self._turn
        box = self._boxes[self._turn, self._teller, : len(values)]
        if self._rank == self._teller:
            box[:] = values
        self._gate.meet()
        values[:] = box


class SlotQueue:
    """A queue for compute slots, which are taken in the order of asking; no two ranks have the same slot at once.

    It needs memory whose ranks can sleep. The first rank's constructor writes words for all ranks, so a barrier must
    follow before the first slot is taken.

    Args:
        memory: The memory of the queue, of which it takes :meth:`nbytes` bytes at its start, zeroed.
        at_once: The number of slots.
        waiter: The waiter of this rank.
    """

    def __init__(self, memory: Memory, at_once: int, waiter: Waits) -> None:
        words = memory.array(0, (self.nbytes(memory.size, at_once) // LINE, LINE // 4), np.uint32)
        self._words = words  # keeps the memory alive
        if memory.rank == 0:
            first = min(at_once, memory.size)
            words[2 : 2 + first, 0] = 1 + np.arange(first)  # the first slots are free
        self._library, self._waiter, self._at_once = required_library(), waiter, at_once
        self._gate = GateState(0, 1, 0, 1, 0, LONGEST_KERNEL_SLEEP_NS, 0)
        self._at = ctypes.addressof(self._gate)
        self._queue = address_of(words), memory.size
        self.slot = 0
        """The number of the slot that this rank has taken."""

    @staticmethod
    def nbytes(size: int, at_once: int) -> int:
        """Return the bytes that a queue of ``size`` ranks for ``at_once`` slots needs."""
        return LINE * (2 + size + at_once)

    def begin(self) -> None:
        """Ask for a slot, and return when this rank has one."""
        self._library.ask_slot(self._at, *self._queue)
        self._waiter.wait_asleep(self._begun)

    def end(self) -> None:
        """Give the slot back, so that the next rank in the queue gets one."""
        self._library.give_slot_back(*self._queue, self._at_once, self.slot)

    def _begun(self) -> bool:
        self.slot = self._library.take_slot(self._at, self._waiter.slept_at, *self._queue, self._at_once)
        return self.slot >= 0


def deal_records(
    room: NDArray[np.int32], bounds: NDArray[np.int64], records: NDArray[np.int32], leaf: NDArray[np.int64], first: int
) -> None:
    """Write records in the order of the ranks that compute them.

    Args:
        room: (capacity, width) The records to write, from number ``first`` of that order on.
        bounds: (size + 1,) The numbers in that order at which each rank's records begin, and the number of all records;
            written.
        records: (B, width) The records in the order of the batch.
        leaf: (B,) The rank that computes each record.
        first: The number of records that were written before.
    """
    n, size, library = len(records), len(bounds) - 1, gates_library()
    if library is not None and n <= len(room):
        records, leaf = np.ascontiguousarray(records, np.int32), np.ascontiguousarray(leaf, np.int64)
        arrays: tuple[NDArray[Any], ...] = (room, bounds, records, leaf, np.empty(size, np.int64))
        library.deal_rows(*map(address_of, arrays), n, 4 * records.shape[1], size)
        return
    bounds[0] = 0
    np.cumsum(np.bincount(leaf, minlength=size), out=bounds[1:])
    part = np.argsort(leaf, kind="stable")[first : first + len(room)]
    np.take(records, part, axis=0, out=room[: len(part)])


def required_library() -> ctypes.CDLL:
    """Return the library of gates.c, which must have been built."""
    library = gates_library()
    assert library is not None
    return library
