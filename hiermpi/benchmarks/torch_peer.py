"""The module provides PyTorch's best forms of the same training step, which are the peer of ``bench step``."""

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed
from torch import nn
from torch.nn import functional

from hiermpi.communication.agreement import broadcast_object, gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.config.schema import Config, ModelConfig


class Block(nn.Module):
    """A pre-norm block with ``scaled_dot_product_attention``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(width, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Peer(nn.Module):
    """A GPT of the same shape, which returns its loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.context_length, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def torch_methods(config: Config, comms: Communicators) -> tuple[dict[str, Callable[[int], None]], list[str]]:
    """Return the forms that work, and a note on each that was tried. Collective over the world."""
    methods: dict[str, Callable[[int], None]] = {}
    notes = [f"PyTorch {torch.__version__}"]
    bound = gather_objects(comms.node, os.sched_getaffinity(0), comms.waiter)
    cores = set().union(*bound or [])  # a launcher may have bound each rank to a core of its own
    share = max(1, config.train.batch_size // comms.size)
    if comms.size > 1:
        place = (socket.gethostbyname(socket.gethostname()), free_port()) if comms.rank == 0 else None
        host, port = broadcast_object(comms.world, place, comms.waiter)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{host}:{port}", rank=comms.rank, world_size=comms.size
        )
        parallel = nn.parallel.DistributedDataParallel(Peer(config.model))
        threads = config.run.threads_per_rank
        methods["torch DDP"] = stepping(parallel, config, share, os.sched_getaffinity(0), threads)
        notes.append(f"torch DDP over gloo: {comms.size} processes of {threads} thread{'s' if threads > 1 else ''}")
    for compiled in (False, True):
        name = "torch compiled" if compiled else "torch"
        if comms.rank != 0:
            methods[name] = nothing
            continue
        model = Peer(config.model)
        call = stepping(
            compile_module(model) if compiled else model, config, config.train.batch_size, cores, len(cores)
        )
        try:
            call(1)
        except Exception as error:  # noqa: BLE001  (a compiler may be missing; then this form is not measured)
            notes.append(f"{name}: not measured ({type(error).__name__})")
            call = nothing
        else:
            notes.append(f"{name}: one process of {len(cores)} threads")
        methods[name] = call
    usable = broadcast_object(
        comms.world, [note.split(":")[0] for note in notes if "not measured" in note], comms.waiter
    )
    return {name: call for name, call in methods.items() if name not in usable}, notes


def stepping(
    model: nn.Module, config: Config, sequences: int, cores: set[int], threads: int
) -> Callable[[int], None]:
    """Return a function that does training steps with a fused AdamW.

    Args:
        model: The model, which returns its loss.
        config: The configuration of the optimizer and the shapes.
        sequences: The number of sequences of a step.
        cores: The cores to use.
        threads: The number of threads of PyTorch.
    """
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    shape = (sequences, config.model.context_length)
    inputs, targets = (torch.randint(config.model.vocab_size, shape) for _ in range(2))

    def some_steps(count: int) -> None:
        with using(cores, threads):
            for _ in range(count):
                optimizer.zero_grad(set_to_none=True)
                model(inputs, targets).backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or 1e9)
                optimizer.step()

    return some_steps


@contextmanager
def using(cores: set[int], threads: int) -> Iterator[None]:
    """Let PyTorch use these cores and this number of threads in the body; threads that it starts keep the cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, before)


def compile_module(model: nn.Module) -> nn.Module:
    """Compile ``model`` with ``torch.compile``."""
    return cast(nn.Module, torch.compile(model))


def free_port() -> int:
    """Return a TCP port that no process uses at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def nothing(count: int) -> None:
    """Do nothing, in the turn of a form that runs on another rank or not at all."""
