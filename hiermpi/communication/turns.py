"""Turns to compute, where a node has more ranks than cores.

Ranks that share a core push each other out of its caches at every switch, and together they need more memory than
caches hold. So only as many compute at once as keep the cores busy (:mod:`hiermpi.hierarchy.turns`), each to the end
of its call, and one after the other in the same memory: the model's activations stay in the caches, and the node holds
them once per core instead of once per rank.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.objects import agree, broadcast_object, gather_objects
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
from hiermpi.hierarchy.turns import at_once
from hiermpi.model.parameters import whole_lines
from hiermpi.native import at


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
    """

    def __init__(self, memory: NodeMemory, ranks: int, work_in: Callable[[int], None], waiter: Waiter) -> None:
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
        self._turns = at(words), memory.size
        self._ranks = ranks
        self._place = 0

    @staticmethod
    def lines(size: int, ranks: int) -> int:
        """Cache lines that the turns of ``size`` ranks take, ``ranks`` at once."""
        return 2 + size + ranks

    def __enter__(self) -> None:
        self._library.ask_turn(self._at, *self._turns)
        self._waiter.wait_asleep(self._begun)
        self._work_in(self._place)

    def _begun(self) -> bool:
        self._place = self._library.begin_turn(self._at, self._waiter.slept_at, *self._turns, self._ranks)
        return self._place >= 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.end_turn(*self._turns, self._ranks, self._place)


def node_cores(comms: Communicators) -> int:
    """Cores that the ranks of this node may use together. Collective over the node."""
    mine = gather_objects(comms.node, sorted(os.sched_getaffinity(0)), comms.waiter)
    count = len({core for cores in mine for core in cores}) if mine else 0
    return broadcast_object(comms.node, count, comms.waiter)


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
    ranks = at_once(leaves, max(1, node_cores(comms) // threads))
    turns, error = Turns(), None
    if ranks < leaves and shared_memory_usable() and node_library() is not None:
        elements = model.workspace_elements()
        start, stride = LINE * NodeTurns.lines(node.size, ranks), whole_lines(4 * elements)
        try:
            # Room for as many sequences as a rank may ever get: taken where it is written.
            memory = NodeMemory(node, start + ranks * stride, comms.waiter, [(0, start)])
            if memory.library is not None:
                places = [memory.array(start + index * stride, (elements,), np.float32) for index in range(ranks)]
                model.share_workspaces(places)
                turns = NodeTurns(memory, ranks, model.work_in, comms.waiter)
        except UserError as caught:
            error = caught
    agree(comms.world, error, comms.waiter)  # and the first words are written
    return turns
