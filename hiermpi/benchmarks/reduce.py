"""The module times ways to sum a vector over all ranks, and measures the figures from which ``plan`` predicts."""

import dataclasses
import datetime
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.benchmarks.measuring import interleaved, row
from hiermpi.benchmarks.step import make_trainer, step_flops
from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators, usable_cores
from hiermpi.communication.reduction import Reduction, Vectors, chunked
from hiermpi.communication.waiting import Waiter
from hiermpi.config.registry import REDUCTIONS
from hiermpi.config.schema import Config, listed
from hiermpi.hierarchy.ownership import Ownership, owned_by_root
from hiermpi.hierarchy.topology import block_bounds
from hiermpi.model.contract import Batch, WritingModel, micro_batch_sequences
from hiermpi.planning.cost import Line, Machine, leaf_seconds, predict
from hiermpi.training.assembly import assemble
from hiermpi.training.batches import BatchSource
from hiermpi.training.trainer import Trainer

SECONDS_PER_SIZE = 15.0
CALLS_BELOW = 1_000_000
"""The number of floats below which a turn has several calls, since ranks leave a barrier at unequal times."""


def bench_reduce(world: MPI.Comm, setting: str = "auto", largest: int = 10**8, rounds: int = 12) -> dict[str, Any]:
    """Measure the reductions at growing sizes. Collective over ``world``.

    A call sums gradients to the root and gives every rank the root's parameters. ``sum bandwidth`` is what the cores
    of a node reach when they sum the same buffers into one without any waiting.

    Args:
        world: The communicator of the ranks.
        setting: The value of ``hierarchy.reduction``, whose reductions from outside are measured, too.
        largest: The largest size in floats.
        rounds: The number of timed turns of each method.

    Returns:
        The rows per method and size, the ratios at each size, notes on what was not measured, and the number of nodes.
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
    """Measure the reductions at one size, and return their rows. Collective over the hierarchy.

    Args:
        comms: The hierarchy.
        names: The names of the reductions.
        n: The size in floats.
        rounds: The number of timed turns of each method.
    """
    ownership, vectors = owned_by_root(n), Vectors(state=())
    chosen = make_reduction(",".join(names), comms, ownership, vectors)
    name = chosen.name
    chosen.reduction.free()
    del chosen  # its memory must be free before the same is allocated again
    made = {kind: make_reduction(kind, comms, ownership, vectors).reduction for kind in names}
    # All methods share one vector, since the method is timed and not the memory.
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
    """Return a function that calls ``method`` ``calls`` times."""

    def call() -> None:
        for _ in range(calls):
            method()

    return call


def both_ways(
    how: Reduction, gradients: NDArray[np.float32], parameters: NDArray[np.float32]
) -> Callable[[], None]:
    """Return a function that sums gradients and broadcasts parameters with a reduction of hiermpi.

    Args:
        how: The reduction.
        gradients: The vector to sum.
        parameters: The vector to broadcast.
    """
    sums, verdict = np.zeros(4), np.ones(4)

    def call() -> None:
        how.reduce(sums, gradients)
        how.broadcast(verdict, parameters)

    return call


def plain_mpi(comms: Communicators, vector: NDArray[np.float32]) -> dict[str, Callable[[], None]]:
    """Return the MPI library's own calls for the same task, by name."""
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
    """A reduction that can sum a part of the vector over its node's gradients without any waiting."""

    ownership: Ownership

    def sum_part(self, start: int, stop: int) -> None:
        """Sum the elements from ``start`` up to ``stop``."""


def own_bandwidth(comms: Communicators, shared: SumsParts) -> Callable[[], None]:
    """Return a function that sums a part of a node's gradients in memory on each of its cores, without any waiting."""
    summing = min(comms.node.size, usable_cores())
    bounds, place = block_bounds(shared.ownership.size, summing), comms.node.rank

    def call() -> None:
        if place < summing:
            shared.sum_part(bounds[place], bounds[place + 1])

    return call


def available_memory() -> int:
    """Return the number of bytes of memory that this machine has free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


TURNS = 5
WARM_UP = 3
MOST_STEPS = 40
SECONDS = 4.0
"""The longest time in seconds for measuring steps after the first ones."""
COMPUTE_SECONDS = 0.3
COORDINATING = ("scatter", "reduce", "optimize", "broadcast", "commit")


def measure_machine(config: Config, world: MPI.Comm, rows: list[dict[str, Any]]) -> Machine:
    """Measure the figures of the machine as rank 0 sees them. Collective over ``world``.

    Args:
        config: The configuration whose model and batch are used, with the vocabulary size resolved.
        world: The communicator of the ranks of one node.
        rows: The rows of :func:`hiermpi.benchmarks.reduce.bench_reduce`.
    """
    cores, waiter = usable_cores(), Waiter()
    few = min(world.size, cores)
    call, token = compute_seconds(config, world, few, waiter)
    machine = Machine(
        host=socket.gethostname(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        cores=cores,
        ranks=world.size,
        token_flops=step_flops(config) / (config.train.batch_size * config.model.context_length),
        token_seconds=token,
        call_seconds=call,
        sum_rate=sum_rate(rows, world.size),
        optimize_seconds=0.0,
        batch_seconds=0.0,
        overhead_seconds=0.0,
        crowded_overhead_seconds=0.0,
        root_seconds=0.0,
        tree=fitted_line(rows, "tree", world.size),
        flat=fitted_line(rows, "flat", world.size),
    )
    machine = with_overheads(machine, config, world, few, waiter)
    return broadcast_object(world, machine, waiter)


def compute_seconds(config: Config, world: MPI.Comm, n: int, waiter: Waiter) -> tuple[float, float]:
    """Return the CPU seconds (per call, per token) while ``n`` ranks compute. Collective over ``world``.

    Args:
        config: The configuration whose model is used.
        world: The communicator of the ranks of one node.
        n: The number of ranks that compute; the others sleep.
        waiter: The waiter of this rank.
    """
    model = config.model
    several = max(2, min(micro_batch_sequences(model, config.train.micro_batch_size), 8))
    medians = np.zeros(2)
    if world.rank < n:
        alone = Communicators(MPI.COMM_SELF, model.symmetry_order)
        single = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, micro_batch_size=several),
            hierarchy=dataclasses.replace(config.hierarchy, reduction="flat"),
        )
        rank = assemble(single, alone, data=None, training=False)
        gradients = rank.model.parameters.new_vector()
        tokens = np.random.default_rng(world.rank).integers(0, model.vocab_size, (several, model.context_length + 1))
    for index, sequences in enumerate((1, several)):
        idle_barrier(world)
        if world.rank < n:
            rows = tokens[:sequences].astype(np.int32)
            batch = Batch(rows[:, :-1], rows[:, 1:], np.arange(sequences), 1, 1)
            writes = isinstance(rank.model, WritingModel)
            compute = rank.model.write_gradients if writes else rank.model.loss_and_gradients  # type: ignore[attr-defined]
            taken: list[float] = []
            begun = time.perf_counter()
            while len(taken) <= TURNS or time.perf_counter() - begun < COMPUTE_SECONDS:
                start = time.process_time()
                compute(batch, gradients)
                taken.append(time.process_time() - start)
            medians[index] = statistics.median(taken[1:])
    if world.rank < n:
        rank.free()
        alone.free()
    idle_barrier(world)
    waiter.wait(world.Iallreduce(MPI.IN_PLACE, medians))
    one, many = medians / n
    token = max(many - one, 1e-9) / ((several - 1) * model.context_length)
    return max(one - token * model.context_length, 0.0), token


def sum_rate(rows: list[dict[str, Any]], ranks: int) -> float:
    """Return the bytes per second of the largest sum, with its waiting where ranks share no memory."""
    alone = [entry["bytes_per_second"] for entry in rows if entry["method"] == "sum bandwidth"]
    last = [entry for entry in rows if entry["method"] == "shared"][-1]
    return float(alone[-1] if alone else 4 * last["n"] * (ranks + 1) / last["median_s"])


def idle_barrier(world: MPI.Comm) -> None:
    """Wait in a barrier that takes no CPU time from ranks that measure. Collective over ``world``."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def fitted_line(rows: list[dict[str, Any]], method: str, ranks: int) -> Line:
    """Fit latency and rate of a reduction to its smallest and its largest size.

    Args:
        rows: The rows of :func:`bench_reduce`.
        method: The name of the reduction.
        ranks: The number of ranks.
    """
    known = {entry["n"]: entry["median_s"] for entry in rows if entry["method"] == method}
    smallest, largest = min(known), max(known)
    crossing = 8 * (ranks - 1) * (largest - smallest)
    return Line(known[smallest], max(crossing, 1) / max(known[largest] - known[smallest], 1e-9))


def with_overheads(machine: Machine, config: Config, world: MPI.Comm, few: int, waiter: Waiter) -> Machine:
    """Measure what real steps take beyond the predicted parts. Collective over ``world``.

    Args:
        machine: The figures that are known.
        config: The configuration whose model and batch are used.
        world: The communicator of the ranks of one node.
        few: The number of ranks that have a core each; the steps of these and of all ranks are measured.
        waiter: The waiter of this rank.

    Returns:
        The figures, completed on rank 0.
    """
    for ranks in sorted({few, world.size}):
        some = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
        if some != MPI.COMM_NULL:
            comms = Communicators(some, config.model.symmetry_order, config.hierarchy.coordinators)
            trainer = make_trainer(config, comms)
            seconds = step_seconds(trainer, comms)
            if world.rank == 0:
                machine = dataclasses.replace(machine, **readings(machine, config, trainer, seconds, ranks))
            trainer.rank.free()
            comms.free()
            some.Free()
        idle_barrier(world)
    return machine


def step_seconds(trainer: Trainer, comms: Communicators) -> list[float]:
    """Measure the seconds of steps, after a few untimed ones. Collective over the hierarchy."""
    warm = [trainer.step().seconds for _ in range(WARM_UP)]
    count = max(TURNS, min(MOST_STEPS, int(SECONDS / warm[-1])))
    count = broadcast_object(comms.world, count, comms.waiter)
    return [trainer.step().seconds for _ in range(count)]


def readings(machine: Machine, config: Config, trainer: Trainer, seconds: list[float], ranks: int) -> dict[str, Any]:
    """Return the fields of :class:`Machine` that the measured steps determine.

    Args:
        machine: The figures that are known.
        config: The configuration of the steps.
        trainer: The trainer that did the steps.
        seconds: The seconds of each step.
        ranks: The number of ranks that did the steps.
    """
    phases, steps, topology = trainer.phases, len(seconds) + WARM_UP, trainer.comms.topology
    optimizer = trainer.rank.optimizer
    assert optimizer is not None
    assert trainer.source is not None
    fixed, each = batch_seconds(trainer.source)
    owned = optimizer.elements
    known: dict[str, Any] = {"batch_seconds": each}
    alone = ranks <= machine.cores
    if owned and alone:
        worked = phases.seconds["optimize"] - phases.waits["optimize"]
        known["optimize_seconds"] = worked / steps / owned
    if trainer.sequences and alone:
        # Steps take longer than what was timed alone, and steps are to be predicted, so they set the scale.
        expected = leaf_seconds(machine, config, config.model, trainer.sequences / steps)
        scale = phases.cpu["compute"] / steps / expected
        known |= {name: scale * getattr(machine, name) for name in ("token_seconds", "call_seconds")}
    if ranks == machine.ranks:
        known["root_seconds"] = fixed + sum(phases.cpu[name] for name in COORDINATING) / steps
    predicted = predict(dataclasses.replace(machine, **known), topology, config, config.model)
    rest = max(statistics.median(seconds) - predicted.step_seconds, 0.0)
    if not alone:
        known["crowded_overhead_seconds"] = rest * machine.cores / ranks
    elif ranks > 1:
        known["overhead_seconds"] = rest
    return known


def batch_seconds(source: BatchSource) -> tuple[float, float]:
    """Return the CPU seconds of preparing a batch: a fixed part, and a part for each of its sequences."""
    sizes, medians = (source.batch_size, 8 * source.batch_size), []
    for index, size in enumerate(sizes):
        source.batch_size = size
        taken = []
        for turn in range(TURNS):
            start = time.process_time()
            source.prepare((index * TURNS + turn + 1) * size)
            taken.append(time.process_time() - start)
        medians.append(statistics.median(taken))
    source.batch_size = sizes[0]
    each = max(medians[1] - medians[0], 0.0) / (sizes[1] - sizes[0])
    return max(medians[0] - each * sizes[0], 0.0), each
