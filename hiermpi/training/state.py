"""Where a run stands: counts that every rank knows, and the tensors that a checkpoint holds.

A :class:`RunState` is whole and in token order, so it depends on no number of ranks. It is made by a checkpoint, or by
:func:`gather_state` from what the ranks hold; :func:`spread_state` gives it to the ranks. Initialisation is the case in
which there is none. Whoever rebuilds the ranks of a run in any other way needs these two functions and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import agreed
from hiermpi.communication.scatter import deal_out_owned, gather_owned
from hiermpi.errors import UsageError
from hiermpi.kernels.memory import lazy_zeros
from hiermpi.model.contract import initialize

if TYPE_CHECKING:
    from hiermpi.training.assembly import Rank

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass
class Progress:
    """Counts of the last committed step, the same on every rank."""

    step: int = 0
    """Steps finished, skipped ones included."""
    cursor: int = 0
    """Sequences drawn by them."""
    skipped: int = 0
    """Steps that were skipped for a non-finite loss or gradient."""
    updates: int = 0
    """Updates applied: steps less the skipped ones."""
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class RunState:
    """The state of a run at the root: its counts, its parameters and the optimizer's state, in token order."""

    progress: Progress
    parameters: Tensors
    optimizer: Mapping[str, Tensors] = field(default_factory=dict)
    """The optimizer's tensors by the name of their vector; empty where no update was applied."""


def spread_state(rank: "Rank", state: RunState | None, seed: int) -> None:
    """Give every rank its part of the root's ``state``, or of a newly initialised model. Collective over the hierarchy.

    Args:
        rank: What this rank holds; its :attr:`Rank.progress` is set already.
        state: The state at the root; None elsewhere, and at the root for a run that begins.
        seed: The seed of an initialisation.

    Raises:
        UserError: On every rank, where the state is not of this model and this rule.
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


def gather_state(rank: "Rank") -> RunState | None:
    """Bring the state together at the root; None elsewhere. Collective over root and owners; others may call it."""
    parameters, optimizer = rank.model.parameters, rank.optimizer
    whole = gather_owned(rank.comms, rank.ownership, optimizer.state if optimizer else None)
    if whole is None:
        return None
    found = {name: parameters.tensors_in_token_order(vector) for name, vector in whole.items()}
    return RunState(rank.progress, parameters.tensors_in_token_order(parameters.vector), found)
