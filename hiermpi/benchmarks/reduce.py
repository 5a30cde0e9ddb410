"""Ways to sum a vector over all ranks and give every rank the result, against each other and the memory's own speed."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.benchmarks.measuring import interleaved, row
from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators, usable_cores
from hiermpi.communication.reduction import Reduction, Vectors, chunked
from hiermpi.config.registry import REDUCTIONS
from hiermpi.config.schema import listed
from hiermpi.hierarchy.ownership import Ownership, owned_by_root
from hiermpi.hierarchy.topology import block_bounds

SECONDS_PER_SIZE = 15.0
CALLS_BELOW = 1_000_000
"""Floats below which a turn is several calls: ranks leave the barrier between turns a little apart."""


def bench_reduce(world: MPI.Comm, setting: str = "auto", largest: int = 10**8, rounds: int = 12) -> dict[str, Any]:
    """Rows per method and size, ratios at each size, notes on what did not fit, and the number of nodes.

    A call sums gradients to the root and gives every rank the root's parameters. ``sum bandwidth`` is what the cores
    of a node reach who sum the same buffers into one without waiting for anybody. Collective over ``world``.
    """
    comms = Communicators(world, 12)
    names = named_reductions(setting)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    notes: list[str] = []
    memory = broadcast_object(comms.world, available_memory() * 2 // 3, comms.waiter)
    n = 1000
    while n <= largest:
        needed = 4 * n * (comms.node.size + 3)
        if needed > memory:
            notes.append(f"{n:,} floats: not measured, {needed / 1e9:.1f} GB are over two thirds of the free memory")
            break
        here = bench_size(comms, names, n, rounds)
        rows += here
        medians = {entry["method"]: entry["median_s"] for entry in here}
        best = min(medians[name] for name in names if name in medians)
        ratios |= {
            f"{name} / shared at {n:,}": medians[name] / medians["shared"]
            for name in ("Allreduce", "Reduce + Bcast", *names)
            if name != "shared"
        }
        ratios[f"auto / best of {', '.join(names)} at {n:,}"] = medians["auto"] / best
        if "sum bandwidth" in medians:
            ratios[f"sum bandwidth reached by shared at {n:,}"] = medians["sum bandwidth"] / medians["shared"]
        n *= 10
    nodes = comms.topology.n_nodes
    comms.free()
    return {"rows": rows, "ratios": ratios, "notes": notes, "nodes": nodes}


def named_reductions(setting: str) -> list[str]:
    """Return the registered reductions, and those from outside that ``setting`` lists."""
    return [*REDUCTIONS, *(name for name in listed(setting) if name != "auto" and name not in REDUCTIONS)]


def bench_size(comms: Communicators, names: Sequence[str], n: int, rounds: int) -> list[dict[str, Any]]:
    """Rows at one size. Collective over the hierarchy."""
    ownership, vectors = owned_by_root(n), Vectors(state=())
    chosen = make_reduction(",".join(names), comms, ownership, vectors)
    name = chosen.name
    chosen.reduction.free()
    del chosen  # and its memory, before the same is taken again
    made = {kind: make_reduction(kind, comms, ownership, vectors).reduction for kind in names}
    # One vector for all: what is timed is the way, not the memory.
    sharing = next((how for how in made.values() if how.shares_memory), next(iter(made.values())))
    gradients, parameters = sharing.gradient_vector(), sharing.parameter_slots()[0]
    methods = {kind: both_ways(how, gradients, parameters) for kind, how in made.items()}
    methods["auto"] = methods[name]
    methods |= plain_mpi(comms, gradients)
    if isinstance(sharing, SumsParts):
        methods["sum bandwidth"] = own_bandwidth(comms, sharing)
    calls = max(1, min(20, CALLS_BELOW // n))
    repeated = {kind: several(method, calls) for kind, method in methods.items()}
    barrier = lambda: comms.waiter.wait(comms.world.Ibarrier())  # noqa: E731
    begun = time.perf_counter()
    interleaved(repeated, 1, barrier)
    turn = (time.perf_counter() - begun) / 2
    rounds = broadcast_object(comms.world, max(3, min(rounds, int(SECONDS_PER_SIZE / turn))), comms.waiter)
    seconds = interleaved(repeated, rounds, barrier)
    for how in made.values():
        how.free()
    rows: list[dict[str, Any]] = []
    for kind, taken in seconds.items():
        entry = row(kind, comms.size, n, [s / calls for s in taken])
        if kind == "sum bandwidth":
            entry["bytes_per_second"] = 4 * n * (comms.node.size + 1) / entry["median_s"]
        elif kind == "auto":
            entry["chosen"] = name
        rows.append(entry)
    return rows


def several(method: Callable[[], None], calls: int) -> Callable[[], None]:
    """``calls`` of ``method``."""

    def call() -> None:
        for _ in range(calls):
            method()

    return call


def both_ways(
    how: Reduction, gradients: NDArray[np.float32], parameters: NDArray[np.float32]
) -> Callable[[], None]:
    """Sum up, parameters down, with one of our reductions."""
    sums, verdict = np.zeros(4), np.ones(4)

    def call() -> None:
        how.reduce(sums, gradients)
        how.broadcast(verdict, parameters)

    return call


def plain_mpi(comms: Communicators, vector: NDArray[np.float32]) -> dict[str, Callable[[], None]]:
    """What the MPI library offers for the same."""
    world = comms.world

    def reduce_bcast() -> None:
        if comms.rank == 0:
            world.Reduce(MPI.IN_PLACE, vector)
        else:
            world.Reduce(vector, None)
        world.Bcast(vector)

    def ireduce(chunk: NDArray) -> MPI.Request:
        return world.Ireduce(MPI.IN_PLACE, chunk) if comms.rank == 0 else world.Ireduce(chunk, None)

    def ireduce_ibcast() -> None:
        chunked(comms.waiter, vector, ireduce)
        chunked(comms.waiter, vector, world.Ibcast)

    return {
        "Allreduce": lambda: world.Allreduce(MPI.IN_PLACE, vector),
        "Reduce + Bcast": reduce_bcast,
        "Ireduce + Ibcast, chunked": ireduce_ibcast,
    }


@runtime_checkable
class SumsParts(Protocol):
    """A reduction that sums a part of the vector over its node's gradients, waiting for nobody."""

    ownership: Ownership

    def sum_part(self, start: int, stop: int) -> None:
        """Sum these elements."""


def own_bandwidth(comms: Communicators, shared: SumsParts) -> Callable[[], None]:
    """The sum of a node's gradients where they lie, each of its cores a part, nobody waiting for anybody."""
    summing = min(comms.node.size, usable_cores())
    bounds, place = block_bounds(shared.ownership.size, summing), comms.node.rank

    def call() -> None:
        if place < summing:
            shared.sum_part(bounds[place], bounds[place + 1])

    return call


def available_memory() -> int:
    """Bytes that this machine can still give."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
