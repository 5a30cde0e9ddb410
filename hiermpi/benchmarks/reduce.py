"""Ways to sum a vector over all ranks and give every rank the result, against each other."""

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.benchmarks.measuring import interleaved, row
from hiermpi.communication.choosing import make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Reduction, chunked
from hiermpi.hierarchy.ownership import owned_by_root

MEMORY_BUDGET = 4 << 30


def bench_reduce(world: MPI.Comm, largest: int = 10**7, rounds: int = 9) -> dict[str, Any]:
    """Rows per method and size, ratios at each size of Allreduce and Reduce + Bcast to ``shared``.

    A call sums gradients to the root and gives every rank the root's parameters. Collective over ``world``.
    """
    comms = Communicators(world, 12)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    n = 1000
    while n <= largest and 4 * n * (comms.size * 6 + 2) <= MEMORY_BUDGET:
        made = {kind: make_reduction(kind, comms, owned_by_root(n)).reduction for kind in ("tree", "shared", "flat")}
        methods = {kind: both_ways(how) for kind, how in made.items()}
        methods |= plain_mpi(comms, n)
        barrier = lambda: comms.waiter.wait(comms.world.Ibarrier())  # noqa: E731
        seconds = interleaved(methods, rounds, barrier)
        here = [row(name, comms.size, n, taken) for name, taken in seconds.items()]
        rows += here
        medians = {entry["method"]: entry["median_s"] for entry in here}
        ratios |= {
            f"{name} / shared at {n:,}": medians[name] / medians["shared"]
            for name in ("Allreduce", "Reduce + Bcast", "tree")
        }
        for how in made.values():
            how.free()
        n *= 10
    comms.free()
    return {"rows": rows, "ratios": ratios}


def both_ways(how: Reduction) -> Callable[[], None]:
    """Sum up, parameters down, with one of our reductions."""
    gradients, parameters = how.gradient_vector(), how.parameter_vector()
    sums, verdict = np.zeros(4), np.ones(4)

    def call() -> None:
        how.reduce(sums, gradients)
        how.broadcast(verdict, parameters)

    return call


def plain_mpi(comms: Communicators, n: int) -> dict[str, Callable[[], None]]:
    """What the MPI library offers for the same."""
    vector, world = np.zeros(n, np.float32), comms.world

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
