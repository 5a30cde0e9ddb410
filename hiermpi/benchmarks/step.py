"""The module times the training step with compiled and numpy kernels, against sgemm, the peak rate and PyTorch.

Every method does the same work per call: one optimizer step on the same number of sequences of the same shapes, on the
same cores. PyTorch runs inside the same job and alternates with the others: as DDP over gloo on the same processes, as
one process with all threads, and compiled where that works; the best of these is the peer. The result lists which forms
ran, and why others did not. The step's floating-point operations are also timed as one large product, and as
multiply-adds on registers alone, which is a lower bound for every method.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.benchmarks.measuring import interleaved, row
from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.communicators import Communicators
from hiermpi.config.schema import Config
from hiermpi.kernels import load_kernels, using_kernels
from hiermpi.model.contract import figure_of, load_family
from hiermpi.model.parameters import symmetry_groups
from hiermpi.training.assembly import assemble
from hiermpi.training.trainer import Trainer

CORPUS_TOKENS = 1 << 20
Steps = Callable[[int], None]
"""The type of a function that does a given number of steps."""

TURN_SECONDS = 0.4
WARM_UP_STEPS = 2
SETTLING_SECONDS = 0.25
"""The pause in seconds before each turn: threads of PyTorch's OpenMP spin for a while after their work."""


class RandomTokens:
    """A corpus in memory with the same tokens for training and validation."""

    def __init__(self, vocab_size: int, symmetry_order: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, CORPUS_TOKENS).astype(np.uint16)
        self.symmetry_group = symmetry_groups(None, vocab_size, symmetry_order)
        self.counts = np.bincount(self.tokens, minlength=vocab_size)

    def length(self, split: str) -> int:
        return len(self.tokens)

    def in_memory(self, split: str) -> NDArray[np.unsignedinteger]:
        return self.tokens

    def read(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int32)


def make_trainer(config: Config, comms: Communicators) -> Trainer:
    """Assemble a rank on random tokens, as ``train`` does, and make its trainer. Collective over the hierarchy."""
    data = RandomTokens(config.model.vocab_size, config.model.symmetry_order) if comms.rank == 0 else None
    rank = assemble(config, comms, data=data)
    return Trainer(rank, rank.batch_source(data) if data else None)


def bench_step(config: Config, world: MPI.Comm, rounds: int = 12, peers: bool = True) -> dict[str, Any]:
    """Measure the seconds per step of each method. Collective over ``world``.

    Args:
        config: The configuration of shapes and batch, with the vocabulary size resolved.
        world: The communicator of the ranks.
        rounds: The number of turns of each method.
        peers: Whether to measure PyTorch.

    Returns:
        The rows per method, the ratios of the others' medians to hiermpi's, and notes.
    """
    comms = Communicators(world, config.model.symmetry_order, config.hierarchy.coordinators)
    trainers = {"hiermpi": make_trainer(config, comms)}
    if load_kernels().name != "numpy":
        with using_kernels("numpy"):
            trainers["hiermpi numpy kernels"] = make_trainer(config, comms)
    exact = dataclasses.replace(config.hierarchy, reproducible=True)
    trainers["hiermpi reproducible"] = make_trainer(dataclasses.replace(config, hierarchy=exact), comms)
    steps = steps_per_turn(trainers["hiermpi"], comms)

    def stepping(trainer: Trainer) -> Steps:
        def some_steps(count: int) -> None:
            for _ in range(count):
                trainer.step()

        return some_steps

    methods: dict[str, Steps] = {name: stepping(trainer) for name, trainer in trainers.items()}
    tokens = config.train.batch_size * config.model.context_length
    flops = step_flops(config)
    if flops:
        methods["sgemm"] = _sgemm(max(1, tokens // comms.size), config.model.n_embd, flops / comms.size)
        methods["fma peak"] = _fma_peak(config.run.threads_per_rank, flops / comms.size)
    notes = _add_peers(methods, config, comms) if peers else ["no peer was asked for"]
    if not flops:
        notes.append(f"no rates: {config.model.family} does not give flops_per_token")

    def settle() -> None:
        comms.waiter.wait(comms.world.Ibarrier())
        time.sleep(SETTLING_SECONDS)
        comms.waiter.wait(comms.world.Ibarrier())

    seconds = interleaved(
        {name: partial(method, steps) for name, method in methods.items()},
        rounds,
        settle,
        {name: partial(method, WARM_UP_STEPS) for name, method in methods.items()},
    )
    rows = [
        row(
            name,
            comms.size,
            tokens,
            [s / steps for s in taken],
            **({"gflops": flops * steps / sorted(taken)[len(taken) // 2] / 1e9} if flops else {}),
        )
        for name, taken in seconds.items()
    ]
    medians = {entry["method"]: entry["median_s"] for entry in rows}
    ours = medians["hiermpi"]
    ratios = {f"{name} / hiermpi": median / ours for name, median in medians.items() if name != "hiermpi"}
    torches = {name: median for name, median in medians.items() if name.startswith("torch")}
    if torches:
        best = min(torches, key=lambda name: torches[name])
        ratios[f"best of PyTorch ({best}) / hiermpi"] = torches[best] / ours
        if "fma peak" in medians:
            ratios[f"best of PyTorch ({best}) / fma peak"] = torches[best] / medians["fma peak"]
    phases = trainers["hiermpi"].rank.phases
    for trainer in trainers.values():
        trainer.rank.free()
    result = {"rows": rows, "ratios": ratios, "notes": notes, "phases": phases.seconds, "waits": phases.waits}
    comms.free()
    return result


def steps_per_turn(trainer: Trainer, comms: Communicators) -> int:
    """Return the number of steps that fill a turn. Collective over the hierarchy.

    A turn has several steps because another method's turn leaves the caches cold.
    """
    for _ in range(2):
        seconds = trainer.step().seconds
    return broadcast_object(comms.world, max(1, min(20, round(TURN_SECONDS / seconds))), comms.waiter)


def step_flops(config: Config) -> float:
    """Return the floating-point operations of a step, or 0 where the model's family does not count them."""
    of_token = figure_of(load_family(config.model.family), "flops_per_token", config.model)
    return of_token * config.train.batch_size * config.model.context_length


def _sgemm(rows: int, width: int, flops: float) -> Steps:
    """Do a rank's operations of a step as one large product, to show the rate of the machine's BLAS at these widths.

    Args:
        rows: The number of rows of the left factor.
        width: The number of its columns.
        flops: The floating-point operations of a step.
    """
    a = np.ones((rows, width), np.float32)
    b, out = np.ones((width, 4 * width), np.float32), np.empty((rows, 4 * width), np.float32)
    repeats = max(1, round(flops / (2.0 * rows * width * 4 * width)))

    def multiply(count: int) -> None:
        for _ in range(count * repeats):
            np.matmul(a, b, out=out)

    return multiply


def _fma_peak(threads: int, flops: float) -> Steps:
    """Do a rank's operations of a step as multiply-adds on registers alone, on all of its threads."""
    kernels = load_kernels()
    if threads == 1:
        return lambda count: kernels.multiply_adds(count * flops)
    pool = ThreadPoolExecutor(threads)

    def multiply(count: int) -> None:
        list(pool.map(kernels.multiply_adds, [count * flops / threads] * threads))

    return multiply


def _add_peers(methods: dict[str, Steps], config: Config, comms: Communicators) -> list[str]:
    """Add the forms of PyTorch that work to ``methods``, and return notes on those that were tried.

    The call is collective over the world.

    Args:
        methods: The methods by name, which grow.
        config: The configuration of shapes and batch.
        comms: The hierarchy.
    """
    try:
        from hiermpi.benchmarks.torch_peer import torch_methods
    except ImportError:
        return ["PyTorch is not installed (pip install torch): no peer was measured"]
    made, notes = torch_methods(config, comms)
    methods.update(made)
    return notes
