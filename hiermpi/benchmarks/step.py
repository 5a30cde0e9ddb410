"""The training step: compiled against numpy kernels, the machine's own sgemm rate and its peak, and PyTorch.

Every method does the same work per call: one optimizer step on the same number of sequences of the same shapes, on the
same cores. PyTorch runs inside the same job, in turns: as DDP over gloo on the same processes, as one process with all
threads, and compiled where that works; the best of these is the peer. Which forms ran, and why others did not, is in
the result. Beside them the step's floating-point operations as one large product, and as multiply-adds on registers
alone, the floor under everybody.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.benchmarks.measuring import interleaved, row
from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.compute_slots import make_turns
from hiermpi.communication.reduction import Vectors
from hiermpi.communication.scatter import make_scatter
from hiermpi.config.schema import Config
from hiermpi.data.rows import ID_COLUMNS
from hiermpi.data.sampling import Sampler
from hiermpi.hierarchy.routing import Router
from hiermpi.kernels import Kernels, load_kernels
from hiermpi.kernels.compiled import CompiledKernels
from hiermpi.model.symmetry import symmetry_groups
from hiermpi.model.transformer import Transformer, flops_per_token
from hiermpi.optimizer.slots import slots_of
from hiermpi.optimizer.sums import routed_together, summed_type
from hiermpi.signals import StopRequests
from hiermpi.training.batches import BatchSource
from hiermpi.training.phases import Phases
from hiermpi.training.placement import make_optimizer, optimizer_settings, ownership_of
from hiermpi.training.trainer import Progress, Trainer

CORPUS_TOKENS = 1 << 20
Steps = Callable[[int], None]
"""Does so many steps."""

TURN_SECONDS = 0.4
WARM_UP_STEPS = 2
SETTLING_SECONDS = 0.25
"""Before each turn: the threads of PyTorch's OpenMP go on spinning for a while when their work is done."""


class RandomTokens:
    """A corpus in memory."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, CORPUS_TOKENS).astype(np.uint16)

    def length(self, split: str) -> int:
        return len(self.tokens)

    def in_memory(self, split: str) -> NDArray[np.unsignedinteger]:
        return self.tokens

    def read(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int32)


def make_trainer(config: Config, comms: Communicators, kernels: Kernels) -> Trainer:
    """A trainer on random tokens. Collective over the hierarchy."""
    model_config, root = config.model, comms.rank == 0
    groups = symmetry_groups(None, model_config.vocab_size, model_config.symmetry_order)
    ownership = ownership_of(config, comms.topology, groups)
    vectors = Vectors(summed_type(config), slots_of(config))
    reduction = make_reduction(config.hierarchy.reduction, comms, ownership, vectors).reduction
    model = Transformer(
        model_config,
        storage=reduction.parameter_slots(),
        micro_batch_size=config.train.micro_batch_size,
        kernels=kernels,
    )
    if root:
        model.initialize(config.train.seed)
    reduction.share(model.parameters.vector)
    turns = make_turns(comms, model, config.run.threads_per_rank)
    source = None
    optimizer = make_optimizer(config, model, reduction.state_slots(), ownership, comms.rank, kernels)
    if root:
        tokens = RandomTokens(model_config.vocab_size)
        counts = np.bincount(tokens.tokens, minlength=model_config.vocab_size)
        router = Router(comms.topology, config.hierarchy.routing, groups, counts, routed_together(config))
        sampler = Sampler(CORPUS_TOKENS, model_config.context_length, config.train.seed)
        source = BatchSource(tokens, sampler, router, model.symmetry.row_of_token, config.train.batch_size)
    return Trainer(
        config,
        comms,
        model,
        reduction,
        make_scatter(
            comms,
            ID_COLUMNS + model_config.context_length + 1,
            config.train.batch_size,
            in_memory=reduction.shares_memory,
        ),
        Phases(comms.rank, comms.waiter),
        StopRequests(),
        turns,
        Progress(),
        optimizer_settings(config).learning_rate,
        source,
        optimizer,
    )


def bench_step(config: Config, world: MPI.Comm, rounds: int = 12, peers: bool = True) -> dict[str, Any]:
    """Rows per method (seconds per step), ratios of the others' medians to ours. Collective over ``world``.

    Args:
        config: shapes and batch; the vocabulary size is resolved.
        world: the ranks.
        rounds: turns of each method.
        peers: whether to measure PyTorch.
    """
    comms = Communicators(world, config.model.symmetry_order, config.hierarchy.coordinators)
    trainers = {"hiermpi": make_trainer(config, comms, load_kernels())}
    if load_kernels().name != "numpy":
        trainers["hiermpi numpy kernels"] = make_trainer(config, comms, load_kernels("numpy"))
    exact = dataclasses.replace(config.hierarchy, reproducible=True)
    trainers["hiermpi reproducible"] = make_trainer(
        dataclasses.replace(config, hierarchy=exact), comms, load_kernels()
    )
    steps = steps_per_turn(trainers["hiermpi"], comms)

    def stepping(trainer: Trainer) -> Steps:
        def some_steps(count: int) -> None:
            for _ in range(count):
                trainer.step()

        return some_steps

    methods: dict[str, Steps] = {name: stepping(trainer) for name, trainer in trainers.items()}
    methods["sgemm"] = _sgemm(config, comms)
    kernels = load_kernels()
    if isinstance(kernels, CompiledKernels):
        share = flops_per_token(config.model) * config.train.batch_size * config.model.context_length / comms.size
        methods["fma peak"] = lambda count: kernels.multiply_adds(count * share)
    notes = _add_peers(methods, config, comms) if peers else ["no peer was asked for"]

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
    tokens = config.train.batch_size * config.model.context_length
    flops = flops_per_token(config.model) * tokens
    rows = [
        row(
            name,
            comms.size,
            tokens,
            [s / steps for s in taken],
            gflops=flops * steps / sorted(taken)[len(taken) // 2] / 1e9,
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
    phases = trainers["hiermpi"].phases
    for trainer in trainers.values():
        trainer.reduction.free()
    result = {"rows": rows, "ratios": ratios, "notes": notes, "phases": phases.seconds, "waits": phases.waits}
    comms.free()
    return result


def steps_per_turn(trainer: Trainer, comms: Communicators) -> int:
    """Steps that fill a turn: after another method's turn the caches are cold. Collective over the hierarchy."""
    for _ in range(2):
        seconds = trainer.step().seconds
    return broadcast_object(comms.world, max(1, min(20, round(TURN_SECONDS / seconds))), comms.waiter)


def _sgemm(config: Config, comms: Communicators) -> Steps:
    """The model's flops of a step as one large product per rank: what the machine's BLAS reaches at these widths."""
    width = config.model.n_embd
    rows = max(1, config.train.batch_size * config.model.context_length // comms.size)
    a = np.ones((rows, width), np.float32)
    b, out = np.ones((width, 4 * width), np.float32), np.empty((rows, 4 * width), np.float32)
    flops = flops_per_token(config.model) * rows
    repeats = max(1, round(flops / (2.0 * rows * width * 4 * width)))

    def multiply(count: int) -> None:
        for _ in range(count * repeats):
            np.matmul(a, b, out=out)

    return multiply


def _add_peers(methods: dict[str, Steps], config: Config, comms: Communicators) -> list[str]:
    """Add what PyTorch can do here to ``methods``; tell what was tried. Collective over the world."""
    try:
        from hiermpi.benchmarks.torch_peer import torch_methods
    except ImportError:
        return ["PyTorch is not installed (pip install torch): no peer was measured"]
    made, notes = torch_methods(config, comms)
    methods.update(made)
    return notes
