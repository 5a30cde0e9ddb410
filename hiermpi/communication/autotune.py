"""Which reduction: the one that is named, or the fastest for this vector on these ranks."""

import logging
import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from hiermpi.communication.agreement import agree
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import FlatReduction, Reduction, TreeReduction
from hiermpi.communication.shared_memory import shared_memory_usable
from hiermpi.communication.shared_reduction import SharedReduction
from hiermpi.errors import UserError
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels.memory import give_back_memory, lazy_zeros

PREFERRED = ("shared", "tree", "flat")
"""Of candidates that are about as fast, the first is taken, so that noise seldom decides."""
ABOUT_AS_FAST = 1.1
HOPELESS = 2.0
"""Times the fastest: a candidate that once takes longer is not timed again."""
ROUNDS = 7
BUDGET_SECONDS = 1.0

logger = logging.getLogger("hiermpi")


class Chosen(NamedTuple):
    """A reduction, and the median seconds of each candidate where it was chosen by time."""

    reduction: Reduction
    seconds: Mapping[str, float]


def make_reduction(
    kind: str,
    comms: Communicators,
    ownership: Ownership,
    dtype: DTypeLike = np.float32,
    known: str = "",
    slots: int = 1,
) -> Chosen:
    """The reduction called ``kind`` in the configuration. Collective over the hierarchy.

    ``auto`` is ``known``, where an earlier start chose it, else the fastest: each candidate sums the vector and hands
    it down a few times, in turns. Where shared memory cannot be had, ``tree`` takes its place, and the log says so.

    Args:
        kind: ``tree``, ``shared``, ``flat`` or ``auto``.
        comms: the hierarchy.
        ownership: of the vectors.
        dtype: of the gradients: float32, or int64 for fixed point.
        known: an earlier choice, for ``auto``.
        slots: of parameters and moments.
    """
    kind = known if kind == "auto" and known in PREFERRED else kind
    if kind == "auto":
        return fastest(comms, ownership, dtype, slots)
    if kind == "flat":
        return Chosen(FlatReduction(comms, ownership, dtype, slots), {})
    shared = None
    if kind == "shared":
        shared, complaint = try_shared(comms, ownership, dtype, slots)
        if shared is None and comms.rank == 0:
            logger.warning("%s; hierarchy.reduction = tree is used instead", complaint)
    return Chosen(shared or TreeReduction(comms, ownership, dtype, slots), {})


def try_shared(
    comms: Communicators, ownership: Ownership, dtype: DTypeLike, slots: int
) -> tuple[SharedReduction | None, UserError | None]:
    """Node-shared sums, or what stands against them on some rank. Collective over the hierarchy."""
    error, made = None, None
    try:
        if not shared_memory_usable():
            raise UserError("this processor or system does not have what node-shared sums rely on")
        made = SharedReduction(comms, ownership, dtype, slots)
    except UserError as caught:
        error = caught
    try:
        agree(comms.world, error, comms.waiter)
    except UserError as caught:
        return None, caught
    return made, None


def fastest(comms: Communicators, ownership: Ownership, dtype: DTypeLike, slots: int) -> Chosen:
    """The fastest candidate. Collective over the hierarchy."""
    if comms.size == 1:
        return Chosen(TreeReduction(comms, ownership, dtype, slots), {})
    candidates: dict[str, Reduction] = {}
    if comms.topology.n_nodes < comms.size:
        shared, _ = try_shared(comms, ownership, dtype, slots)
        candidates |= {"shared": shared} if shared else {}
    candidates["tree"] = TreeReduction(comms, ownership, dtype, slots)
    candidates["flat"] = FlatReduction(comms, ownership, dtype, slots)
    # One gradient vector serves all, and as their parameters too: only shared has its own.
    leaf = comms.topology.is_leaf(comms.rank)
    gradients = next(iter(candidates.values())).gradient_vector() if leaf else lazy_zeros(ownership.size, dtype)
    seconds = time_in_turns(comms, candidates, gradients)
    name = preferred(seconds)
    if leaf:
        gradients[:] = 0
    for other, reduction in candidates.items():
        if other != name:
            reduction.free()
    del gradients
    give_back_memory()  # that messages took: 6 MB and more, which ranks that do not compute would never use again
    return Chosen(candidates[name], seconds)


def time_in_turns(
    comms: Communicators, candidates: Mapping[str, Reduction], gradients: NDArray
) -> dict[str, float]:
    """Median seconds of a sum and a broadcast with each candidate, the same on every rank. Collective."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun, running, done = time.perf_counter(), set(names), False
    while not done:
        taken = np.zeros(len(names) + 1)
        for index, name in enumerate(names):
            if name in running:
                taken[index] = time_once(comms, candidates[name], gradients)
        taken[-1] = time.perf_counter() - begun
        comms.waiter.wait(comms.world.Iallreduce(MPI.IN_PLACE, taken, op=MPI.MAX))
        best = min(taken[index] for index, name in enumerate(names) if name in running)
        for index, name in enumerate(names):
            if name in running:
                times[name].append(float(taken[index]))
                running -= {name} if taken[index] > HOPELESS * best and len(times[name]) > 1 else set()
        rounds = max(len(entry) for entry in times.values())
        done = rounds > 1 and (len(running) == 1 or rounds > ROUNDS or taken[-1] > BUDGET_SECONDS)
    return {name: statistics.median(entry[1:]) for name, entry in times.items()}


def time_once(comms: Communicators, reduction: Reduction, gradients: NDArray) -> float:
    """Seconds of what a step asks of ``reduction``."""
    ownership = reduction.ownership
    parameters = reduction.parameter_slots()[0] if reduction.name == "shared" else gradients.view(np.float32)
    sums, verdict = np.zeros(8), np.ones(8)
    findings = np.zeros((1, len(ownership.owners))) if reduction.decides else None
    comms.waiter.wait(comms.world.Ibarrier())
    start = time.perf_counter()
    reduction.reduce(sums, gradients)
    if ownership.shared_out:
        reduction.exchange(findings)
    reduction.broadcast(verdict, parameters[: ownership.size])
    return time.perf_counter() - start


def preferred(seconds: Mapping[str, float]) -> str:
    """The first of :data:`PREFERRED` that is about as fast as the fastest."""
    best = min(seconds.values())
    return next(name for name in PREFERRED if name in seconds and seconds[name] <= ABOUT_AS_FAST * best)
