"""The state of a run consists of counts that every rank knows, and of the tensors that a checkpoint holds.

A :class:`RunState` is whole and in token order, so it does not depend on the number of ranks. It comes from a
checkpoint, or from :func:`gather_state`, which collects what ranks hold; :func:`spread_state` gives it to the ranks.
A run that is initialised has none. Code that rebuilds the ranks of a run in another way needs only these two functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import agreed
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Reduction
from hiermpi.communication.scatter import deal_out_owned, gather_owned
from hiermpi.config.schema import Config
from hiermpi.errors import UsageError
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels.memory import lazy_zeros
from hiermpi.model.contract import Family, Model, initialize
from hiermpi.optimizer.rules import Rule
from hiermpi.optimizer.update import Optimizer

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass
class Progress:
    """The counts of the last committed step, which are the same on every rank."""

    step: int = 0
    """The number of finished steps, with the skipped ones."""
    cursor: int = 0
    """The number of sequences that these steps drew."""
    skipped: int = 0
    """The number of steps that were skipped for a non-finite loss or gradient."""
    updates: int = 0
    """The number of updates that were applied: the steps less the skipped ones."""
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class RunState:
    """The state of a run at the root: its counts, its parameters and the optimizer's state, in token order."""

    progress: Progress
    parameters: Tensors
    optimizer: Mapping[str, Tensors] = field(default_factory=dict)
    """The optimizer's tensors by the name of their vector; the table is empty where no update was applied."""


class Stateful(Protocol):
    """The parts of a rank that hold its share of the state; :class:`hiermpi.training.assembly.Rank` has them."""

    @property
    def config(self) -> Config: ...

    @property
    def comms(self) -> Communicators: ...

    @property
    def family(self) -> Family: ...

    @property
    def rule(self) -> Rule: ...

    @property
    def ownership(self) -> Ownership: ...

    @property
    def reduction(self) -> Reduction: ...

    @property
    def model(self) -> Model: ...

    @property
    def optimizer(self) -> Optimizer | None: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def training(self) -> bool: ...


def spread_state(rank: Stateful, state: RunState | None, seed: int) -> None:
    """Give every rank its part of the root's ``state``, or of a newly initialised model. Collective over the hierarchy.

    Args:
        rank: The parts of this rank; its ``progress`` is set already.
        state: The state at the root; None elsewhere, and at the root for a run that begins.
        seed: The seed of an initialisation.

    Raises:
        UserError: The state is not of this model and this rule; every rank raises it.
    """
    model, comms, optimizer = rank.model, rank.comms, rank.optimizer
    names = rank.rule.state
    with agreed(comms.world, comms.waiter):
        if state is not None:
            model.parameters.load_token_order(state.parameters, model.parameters.vector)
            if rank.progress.updates and state.optimizer.keys() != set(names):
                raise UsageError(
                    f"the checkpoint holds the optimizer's state {', '.join(sorted(state.optimizer)) or 'of no name'}, "
                    f"but optimizer.rule = {rank.config.optimizer.rule} has {', '.join(names) or 'none'}: use the rule "
                    "that the run was started with"
                )
        elif comms.rank == 0:
            initialize(rank.family, rank.config.model, model, seed)
    rank.reduction.share(model.parameters.vector)
    if not rank.progress.updates or not rank.training:
        return
    if optimizer is not None:
        optimizer.updates = rank.progress.updates
    whole: dict[str, NDArray] | None = None
    if state is not None:
        whole = {name: lazy_zeros(model.parameters.size, np.float32) for name in names}
        for name, vector in whole.items():
            model.parameters.load_token_order(state.optimizer[name], vector)
    deal_out_owned(comms, rank.ownership, whole, optimizer.state if optimizer else None)


def gather_state(rank: Stateful) -> RunState | None:
    """Gather the state at the root, and return None elsewhere. Collective over root and owners; others may call it."""
    parameters, optimizer = rank.model.parameters, rank.optimizer
    whole = gather_owned(rank.comms, rank.ownership, optimizer.state if optimizer else None)
    if whole is None:
        return None
    found = {name: parameters.tensors_in_token_order(vector) for name, vector in whole.items()}
    return RunState(rank.progress, parameters.tensors_in_token_order(parameters.vector), found)
