"""This module has what the ranks of a node share: memory, and compute slots where there are more ranks than cores.

Shared memory is an anonymous file (memfd) that one rank makes and the others open through /proc. It is not bounded by
the size of /dev/shm, and nothing can be left behind. Unlike an MPI window, it outlives the communicator with which it
was made, and each rank can unmap it alone. The space is allocated at once, so that too little memory is an error and
not a SIGBUS.

Ranks that share a core push each other out of its caches at every switch, and together they need more memory than
caches hold. So only as many ranks compute at once as keep the cores busy
(:func:`hiermpi.hierarchy.topology.compute_slots`), each to the end of its call, and one after the other in the same
memory: the model's activations stay in the caches, and the node holds them once per core instead of once per rank.
Where there are as many slots as cores, each slot has a fixed core. Otherwise the system would often schedule the next
rank behind another that computes, and leave the core that has become free idle for milliseconds.
"""

import mmap
import os
import platform
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.agreement import agreed, broadcast_object, gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import Waiter
from hiermpi.errors import UserError, plugin_errors
from hiermpi.hierarchy.topology import compute_slots
from hiermpi.kernels.gates import SlotQueue, can_sleep
from hiermpi.kernels.memory import round_up

ORDERED_STORES = ("x86_64", "AMD64", "i686")
"""The processors on which other cores see a core's stores in order, as gates that poll need it."""


def shared_memory_usable() -> bool:
    """Tell whether this platform has what gates and shared memory need."""
    return platform.machine() in ORDERED_STORES and hasattr(os, "memfd_create")


class NodeMemory:
    """Zeroed memory that the ranks of a node share; construction is collective over ``node``.

    Args:
        node: The communicator of the ranks that share memory.
        nbytes: The size in bytes.
        waiter: The waiter of this rank.
        used: The byte ranges (start, stop) that are allocated at once; by default all of it.

    Raises:
        UserError: The memory is not available; every rank of ``node`` raises it.
    """

    def __init__(
        self, node: MPI.Comm, nbytes: int, waiter: Waiter, used: Sequence[tuple[int, int]] | None = None
    ) -> None:
        descriptor, source = -1, None
        ranges = [(0, nbytes)] if used is None else used
        with agreed(node, waiter):
            if node.rank == 0:
                try:
                    descriptor = os.memfd_create("hiermpi")
                    os.ftruncate(descriptor, nbytes)
                    for start, stop in ranges:
                        os.posix_fallocate(descriptor, start, stop - start)
                except OSError as error:
                    needed = sum(stop - start for start, stop in ranges)
                    raise UserError(f"no {needed:,} bytes of shared memory on this node: {error.strerror}") from None
                source = os.getpid(), descriptor
        source = broadcast_object(node, source, waiter)
        with agreed(node, waiter):
            try:
                if node.rank != 0 and source is not None:
                    descriptor = os.open(f"/proc/{source[0]}/fd/{source[1]}", os.O_RDWR)
                self._map = mmap.mmap(descriptor, nbytes)
            except OSError as error:
                raise UserError(f"the ranks of this node cannot open each other's memory: {error.strerror}") from None
        os.close(descriptor)
        sleeping = np.array([can_sleep()], np.int64)
        waiter.wait(node.Iallreduce(MPI.IN_PLACE, sleeping, op=MPI.MIN))
        self.sleeps = bool(sleeping[0])
        """Whether all ranks of the node can sleep in the kernel."""
        self.rank, self.size = node.rank, node.size

    def array(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """Return a view of the memory from byte ``offset`` on.

        Args:
            offset: The byte at which the view begins.
            shape: The shape of the view.
            dtype: The element type of the view.
        """
        count = int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)


class ComputeSlots:
    """The context in which a model is called; in this form every rank computes at any time."""

    def __enter__(self) -> None:
        """Take a slot; nothing that is collective may be called before it is given back."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the slot back, also after an error; the error is not suppressed."""


class NodeComputeSlots(ComputeSlots):
    """Compute slots that the ranks of a node take in the order of asking.

    Args:
        queue: The queue that gives the slots.
        work_in: The function that is called with the number of a slot when it is taken.
        cores: The core of each slot; none where the system chooses cores.
    """

    def __init__(self, queue: SlotQueue, work_in: Callable[[int], None], cores: Sequence[int] = ()) -> None:
        self._queue = queue
        self._work_in = work_in
        self._cores = cores
        self._usual_cores = os.sched_getaffinity(0) if cores else set[int]()

    def __enter__(self) -> None:
        self._queue.begin()
        if self._cores:
            self._run_on({self._cores[self._queue.slot]})
        self._work_in(self._queue.slot)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cores:
            self._run_on(self._usual_cores)
        self._queue.end()

    def _run_on(self, cores: set[int]) -> None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError:  # the job lost them, or may not choose cores: the system chooses
            self._cores = ()


class NodeCores(NamedTuple):
    """The cores that the ranks of a node may use."""

    cores: list[int]
    """The numbers of all cores that any rank may use."""
    free: bool
    """Whether every rank may use every one of these cores."""


def node_cores(comms: Communicators) -> NodeCores:
    """Find the cores of this node; this is collective over the node."""
    mine = gather_objects(comms.node, sorted(os.sched_getaffinity(0)), comms.waiter) or []
    together = sorted({core for cores in mine for core in cores})
    return broadcast_object(comms.node, NodeCores(together, all(cores == together for cores in mine)), comms.waiter)


def no_memory(_slot: int) -> None:
    """Do nothing: a model with memory of its own needs no shared workspace."""


def make_compute_slots(comms: Communicators, model: Any, threads: int = 1, outside: str = "") -> ComputeSlots:
    """Make slots where more ranks of this node compute than its cores have room for. Collective over the hierarchy.

    Args:
        comms: The hierarchy.
        model: A model. One that can work in memory of others (``workspace_elements``, ``share_workspaces``,
            ``work_in``) is
            given the memory that belongs to the slots, any other keeps its own.
        threads: The threads of each rank.
        outside: How messages call the model's family, where it comes from outside the package.

    Raises:
        UserError: On every rank, where a node cannot have the memory, or the model cannot work in it.
    """
    topology, node = comms.topology, comms.node
    leaves = topology.leaves_of_node[topology.nodes[comms.rank]]
    cores, free = node_cores(comms)
    at_once = compute_slots(leaves, max(1, len(cores) // threads))
    chosen = cores if free and at_once == len(cores) and threads == 1 else []
    slots, lends, needed = ComputeSlots(), hasattr(model, "share_workspaces"), np.zeros(1, np.int64)
    with agreed(comms.world, comms.waiter), plugin_errors(outside):
        needed[0] = model.workspace_elements() if lends else 0
    comms.waiter.wait(node.Iallreduce(MPI.IN_PLACE, needed, op=MPI.MAX))
    elements = int(needed[0])
    with agreed(comms.world, comms.waiter), plugin_errors(outside):  # the first words are written when it ends
        if at_once < leaves and shared_memory_usable() and can_sleep():
            start, stride = SlotQueue.nbytes(node.size, at_once), round_up(4 * elements)
            # There is space for as many sequences as a rank may ever get; memory is only taken where it is written.
            memory = NodeMemory(node, start + at_once * stride, comms.waiter, [(0, start)])
            if memory.sleeps:
                if lends:
                    offsets = [start + index * stride for index in range(at_once)]
                    model.share_workspaces([memory.array(offset, (elements,), np.float32) for offset in offsets])
                work_in = model.work_in if lends else no_memory
                slots = NodeComputeSlots(SlotQueue(memory, at_once, comms.waiter), work_in, chosen)
    return slots
