"""Turns to compute, where a node has more ranks than cores.

Ranks that share a core push each other out of its caches at every switch, and together they need more memory than
caches hold. So only as many compute at once as keep the cores busy (:mod:`hiermpi.hierarchy.topology`), each to the end
of its call, and one after the other in the same memory: the model's activations stay in the caches, and the node holds
them once per core instead of once per rank.

Where they are as many as the cores, a turn is also one on a certain core. The system would often wake the next rank
behind another that computes, and leave the core that has become free idle for milliseconds.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import agree, broadcast_object, gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.shared_memory import (
    LINE,
    LONGEST_KERNEL_SLEEP_NS,
    GateState,
    NodeMemory,
    node_library,
    shared_memory_usable,
)
from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UserError
from hiermpi.hierarchy.topology import compute_slots
from hiermpi.kernels.memory import address_of, round_up


class Turns:
    """What ``with`` takes around a call of a model. Here every rank computes when it wants to."""

    def __enter__(self) -> None:
        """Begin a turn. Nothing that is collective may be called before it ends."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""


class NodeTurns(Turns):
    """Turns in the order of asking, each in a place of its own. Collective over the node.

    Args:
        memory: holds :meth:`lines` cache lines of it at its start, zeroed.
        ranks: that compute at once.
        work_in: called with the place of a turn, below ``ranks``, when it begins.
        waiter: for the waits.
        cores: for each place the one that it is on; none where the system is to choose.
    """

    def __init__(
        self,
        memory: NodeMemory,
        ranks: int,
        work_in: Callable[[int], None],
        waiter: Waiter,
        cores: Sequence[int] = (),
    ) -> None:
        assert memory.library is not None
        self._library = memory.library
        self._work_in = work_in
        self._waiter = waiter
        words = memory.array(0, (self.lines(memory.size, ranks), LINE // 4), np.uint32)
        self._words = words  # keeps the memory
        if memory.rank == 0:
            first = min(ranks, memory.size)
            words[2 : 2 + first, 0] = 1 + np.arange(first)  # the first turns may begin
        self._gate = GateState(0, 1, 0, 1, 0, LONGEST_KERNEL_SLEEP_NS, 0)
        self._at = ctypes.addressof(self._gate)
        self._turns = address_of(words), memory.size
        self._ranks = ranks
        self._place = 0
        self._cores = cores
        self._usual_cores = os.sched_getaffinity(0) if cores else set[int]()

    @staticmethod
    def lines(size: int, ranks: int) -> int:
        """Cache lines that the turns of ``size`` ranks take, ``ranks`` at once."""
        return 2 + size + ranks

    def __enter__(self) -> None:
        self._library.ask_turn(self._at, *self._turns)
        self._waiter.wait_asleep(self._begun)
        if self._cores:
            self._run_on({self._cores[self._place]})
        self._work_in(self._place)

    def _begun(self) -> bool:
        self._place = self._library.begin_turn(self._at, self._waiter.slept_at, *self._turns, self._ranks)
        return self._place >= 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cores:
            self._run_on(self._usual_cores)
        self._library.end_turn(*self._turns, self._ranks, self._place)

    def _run_on(self, cores: set[int]) -> None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError:  # they were taken from the job, or nobody may choose here: the system chooses
            self._cores = ()


class NodeCores(NamedTuple):
    """Of a node."""

    cores: list[int]
    """That its ranks may use together."""
    free: bool
    """Whether each of the ranks may use each of them."""


def node_cores(comms: Communicators) -> NodeCores:
    """The cores of this node. Collective over it."""
    mine = gather_objects(comms.node, sorted(os.sched_getaffinity(0)), comms.waiter) or []
    together = sorted({core for cores in mine for core in cores})
    return broadcast_object(comms.node, NodeCores(together, all(cores == together for cores in mine)), comms.waiter)


class Shareable(Protocol):
    """A model whose scratch may lie in memory that others use at other times."""

    def workspace_elements(self) -> int:
        """float32s that it needs."""

    def share_workspaces(self, memories: Sequence[NDArray[np.float32]]) -> None:
        """Work in one of these, zeroed, from now on."""

    def work_in(self, place: int) -> None:
        """In this one, by number."""


def make_turns(comms: Communicators, model: Shareable, threads: int = 1) -> Turns:
    """Turns where more ranks of this node compute than its cores have room for. Collective over the hierarchy.

    Args:
        comms: the hierarchy.
        model: is given the memory that belongs to turns.
        threads: of each rank.

    Raises:
        UserError: on every rank, where a node cannot have the memory.
    """
    topology, node = comms.topology, comms.node
    leaves = topology.leaves_of_node[topology.nodes[comms.rank]]
    cores, free = node_cores(comms)
    ranks = compute_slots(leaves, max(1, len(cores) // threads))
    chosen = cores if free and ranks == len(cores) and threads == 1 else []
    turns, error = Turns(), None
    if ranks < leaves and shared_memory_usable() and node_library() is not None:
        elements = model.workspace_elements()
        start, stride = LINE * NodeTurns.lines(node.size, ranks), round_up(4 * elements)
        try:
            # Room for as many sequences as a rank may ever get: taken where it is written.
            memory = NodeMemory(node, start + ranks * stride, comms.waiter, [(0, start)])
            if memory.library is not None:
                places = [memory.array(start + index * stride, (elements,), np.float32) for index in range(ranks)]
                model.share_workspaces(places)
                turns = NodeTurns(memory, ranks, model.work_in, comms.waiter, chosen)
        except UserError as caught:
            error = caught
    agree(comms.world, error, comms.waiter)  # and the first words are written
    return turns
