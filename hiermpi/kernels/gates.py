"""Waiting on words of memory that the ranks of a node share: gates, mailboxes made of them, and a queue for turns.

Each has two forms. Where gates.c was built on every rank of the node, a rank sleeps in the kernel until another wakes
it. Elsewhere it polls, and cannot queue. Which form a memory serves is said by :attr:`Memory.sleeps`.
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
"""Bytes of a cache line."""
MAILBOX_DOUBLES = 16
LONGEST_KERNEL_SLEEP_NS = 1_000_000_000
"""The longest sleep in the kernel: bounded, so that stalls are seen. Signals end it."""
GATE_SPIN_NS = 300_000
"""How long a rank looks at a gate, giving the core away after each look, before it sleeps; only where its last wait
there was shorter. 13 ranks on two cores sum and hand down 10,000 floats in 0.10 ms so, in 0.15 with 50 us."""


class Waits(Protocol):
    """What does a rank's waiting."""

    slept_at: int
    """The address where gates.c accounts for its waits."""

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when ``ready`` says so; it is polled."""

    def wait_asleep(self, done: Callable[..., Any], *arguments: int) -> None:
        """Return when ``done`` says so; it sleeps by itself."""


class Memory(Protocol):
    """Memory that the ranks of a node share."""

    rank: int
    size: int
    sleeps: bool
    """Whether all ranks of the node can sleep in the kernel."""

    def array(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """Return a view of the memory from byte ``offset`` on."""


@cache
def gates_library() -> ctypes.CDLL | None:
    """Return the library of gates.c; None where it was not built, or cannot be used here."""
    library = load_library("_gates")
    return library if library is not None and library.usable() else None


def can_sleep() -> bool:
    """Tell whether this rank can sleep in the kernel until another wakes it."""
    return gates_library() is not None


def gate_bytes(members: int) -> int:
    """Return the bytes that a gate of so many members needs, in whole cache lines."""
    return members * LINE


def mailbox_bytes(size: int) -> int:
    """Return the bytes that the mailboxes of ``size`` ranks need."""
    return 2 * size * MAILBOX_DOUBLES * 8


class Gate(Protocol):
    """Where ranks of a node wait until its members have all arrived, once a round.

    No member may arrive for a round before all have arrived for the one before it.
    """

    def arrive(self) -> None:
        """Begin the next round: a member arrives, any other rank just counts it."""

    def wait(self) -> None:
        """Return when all members have arrived for this rank's round."""

    def meet(self) -> None:
        """Wait for all members, as a barrier does."""


def make_gate(memory: Memory, offset: int, members: Sequence[int], waiter: Waits) -> Gate:
    """Make a gate.

    Args:
        memory: Holds :func:`gate_bytes` bytes of it from ``offset`` on.
        offset: Where.
        members: The ranks of the node that arrive.
        waiter: What does the waiting.
    """
    form = SleepingGate if memory.sleeps else PollingGate
    return form(memory, offset, members, waiter)


class GateState(ctypes.Structure):
    """A gate as gates.c sees it from one rank."""

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
        """Where gates.c finds the gate."""
        self._lines = lines  # keeps the memory

    def arrive(self) -> None:
        self.library.arrive(self.at)

    def wait(self) -> None:
        self.waiter.wait_asleep(self.library.passed, self.at, self.waiter.slept_at)

    def meet(self) -> None:
        self.arrive()
        self.wait()


class PollingGate:
    """A gate in which each member counts its arrivals in a cache line of its own, and who waits polls them."""

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
    """A few numbers from each rank of a node, for all of it, through a gate of all its ranks. Two sets take turns.

    A set is written again only after a gate that all who read it have reached: the next round of this one, or another
    that they pass between its rounds.
    """

    def offer(self, values: NDArray[np.float64]) -> None:
        """Turn to the other set, put this rank's numbers there, and arrive. Waits for the round before."""

    def sum(self, values: NDArray[np.float64]) -> None:
        """When all have arrived, take the sum of the numbers of all ranks, added in their order."""

    def tell(self, values: NDArray[np.float64]) -> None:
        """Turn to the other set, and give every rank the teller's numbers. A barrier."""


def make_mailboxes(memory: Memory, offset: int, gate: Gate, teller: int = 0) -> Mailboxes:
    """Make mailboxes.

    Args:
        memory: Holds :func:`mailbox_bytes` bytes of it from ``offset`` on.
        offset: Where.
        gate: A gate of all ranks of the node, in the same memory. It may have rounds besides.
        teller: The rank of the node whose numbers :meth:`Mailboxes.tell` tells.
    """
    if isinstance(gate, SleepingGate):
        return SleepingMailboxes(memory, offset, gate, teller)
    return PollingMailboxes(memory, offset, gate, teller)


class SleepingMailboxes:
    """Mailboxes of which each call is one of gates.c; see :func:`make_mailboxes`."""

    def __init__(self, memory: Memory, offset: int, gate: SleepingGate, teller: int) -> None:
        boxes = memory.array(offset, (2, memory.size, MAILBOX_DOUBLES), np.float64)
        self._boxes = boxes  # keeps the memory
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
    """Mailboxes through a polling gate; see :func:`make_mailboxes`."""

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


class TurnQueue:
    """Turns in the order of asking, so many at once, each with a slot that nobody else has meanwhile.

    Only for memory whose ranks can sleep. The constructor touches the words that the first rank writes for all: a
    barrier must follow before the first turn.

    Args:
        memory: Holds :meth:`nbytes` bytes of it at its start, zeroed.
        at_once: The turns at the same time.
        waiter: What does the waiting.
    """

    def __init__(self, memory: Memory, at_once: int, waiter: Waits) -> None:
        words = memory.array(0, (self.nbytes(memory.size, at_once) // LINE, LINE // 4), np.uint32)
        self._words = words  # keeps the memory
        if memory.rank == 0:
            first = min(at_once, memory.size)
            words[2 : 2 + first, 0] = 1 + np.arange(first)  # the first turns may begin
        self._library, self._waiter, self._at_once = required_library(), waiter, at_once
        self._gate = GateState(0, 1, 0, 1, 0, LONGEST_KERNEL_SLEEP_NS, 0)
        self._at = ctypes.addressof(self._gate)
        self._turns = address_of(words), memory.size
        self.slot = 0
        """The slot of the turn that has begun."""

    @staticmethod
    def nbytes(size: int, at_once: int) -> int:
        """Return the bytes that the turns of ``size`` ranks take."""
        return LINE * (2 + size + at_once)

    def begin(self) -> None:
        """Ask for a turn, and return when it has begun."""
        self._library.ask_turn(self._at, *self._turns)
        self._waiter.wait_asleep(self._begun)

    def end(self) -> None:
        """End the turn, and let the next one begin."""
        self._library.end_turn(*self._turns, self._at_once, self.slot)

    def _begun(self) -> bool:
        self.slot = self._library.begin_turn(self._at, self._waiter.slept_at, *self._turns, self._at_once)
        return self.slot >= 0


def deal_records(
    room: NDArray[np.int32], bounds: NDArray[np.int64], records: NDArray[np.int32], leaf: NDArray[np.int64], first: int
) -> None:
    """Write records in the order of the ranks that they are for.

    Args:
        room: (capacity, width) written, with the records from ``first`` of that order on.
        bounds: (size + 1,) written: where each rank's records begin in that order, and their number.
        records: (B, width) in the order of the batch.
        leaf: (B,) rank of each record.
        first: How many were dealt before.
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
    """Return the library of gates.c, which is known to be there."""
    library = gates_library()
    assert library is not None
    return library
