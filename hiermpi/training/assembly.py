"""One function assembles the parts of a rank for ``train``, ``evaluate``, ``bench`` and the tests.

The configuration names the parts of a run. Objects of the user's own, given through the Python API, replace these names
as :class:`Choices`.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import agreed, gather_objects
from hiermpi.communication.autotune import guarded, make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.node import ComputeSlots, make_compute_slots
from hiermpi.communication.reduction import Reduction, Vectors, hand_down
from hiermpi.communication.scatter import Scatter, make_scatter
from hiermpi.config.registry import FAMILIES, REDUCTIONS, ROUTINGS, RULES
from hiermpi.config.schema import Config, unread, watched
from hiermpi.data.sequences import Sampler
from hiermpi.errors import UserError
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.hierarchy.routing import Router
from hiermpi.kernels import load_kernels
from hiermpi.kernels.loops import ID_COLUMNS
from hiermpi.model.contract import (
    Family,
    Model,
    load_family,
    make_model,
    micro_batch_sequences,
    outside_family,
    specs_of,
)
from hiermpi.model.parameters import ParameterBuffer, ParameterLayout, SymmetryTable, symmetry_groups
from hiermpi.optimizer.rules import Rule, Schedule, load_rule, load_schedule, require_fit
from hiermpi.optimizer.sums import differing, routed_together, summed_type
from hiermpi.optimizer.update import Optimizer, OptimizerSettings, ownership_of, slots_of
from hiermpi.signals import NeverStop, StopRequests
from hiermpi.training.batches import BatchSource, TokenSource
from hiermpi.training.phases import Fault, Phases
from hiermpi.training.state import Progress, RunState, spread_state

logger = logging.getLogger("hiermpi")


class Choices(NamedTuple):
    """Objects of the user's own that replace what the configuration names; None keeps the name."""

    family: Any = None
    rule: Any = None
    reduction: Any = None
    routing: Any = None

    def named_in(self, config: Config) -> Config:
        """Return ``config`` with the names of these objects, as run folders and checkpoints keep them."""
        model, optimizer, hierarchy = config.model, config.optimizer, config.hierarchy
        return dataclasses.replace(
            config,
            model=dataclasses.replace(model, family=FAMILIES.name_of(self.family, model.family)),
            optimizer=dataclasses.replace(optimizer, rule=RULES.name_of(self.rule, optimizer.rule)),
            hierarchy=dataclasses.replace(
                hierarchy,
                reduction=REDUCTIONS.name_of(self.reduction, hierarchy.reduction),
                routing=ROUTINGS.name_of(self.routing, hierarchy.routing),
            ),
        )


class Corpus(TokenSource, Protocol):
    """The properties of a dataset that a rank needs."""

    symmetry_group: NDArray[np.uint8]
    """The (V,) symmetry class of each token id."""
    counts: NDArray[np.int64]
    """The (V,) frequency of each token id in the corpus."""


@dataclass(frozen=True)
class Rank:
    """The parts that a rank holds to train or to evaluate."""

    config: Config
    comms: Communicators
    family: Family
    rule: Rule
    routing: Any
    """The routing rule, or its name."""
    ownership: Ownership
    reduction: Reduction
    reduction_name: str
    """The name of the reduction in the setting."""
    timed: Mapping[str, float]
    """The measured seconds of each reduction, where one was chosen by time."""
    model: Model
    outside_model: str
    """The text by which messages name a model family from outside the package; it is empty for a registered family."""
    slots: ComputeSlots
    optimizer: Optimizer | None
    """The optimizer on the root and on owners; None elsewhere."""
    learning_rate: Callable[[int], float]
    """The learning rate of a step as a function of the number of finished steps."""
    scatter: Scatter
    phases: Phases
    stopping: StopRequests
    progress: Progress
    training: bool
    seen: set[str]
    """The names of the settings that a family from outside has read."""

    def unread(self) -> list[str]:
        """Return the settings that the user changed and that neither hiermpi nor code from outside reads."""
        found = unread("model", self.config.model, self.seen) if self.outside_model else []
        if self.optimizer is not None and self.optimizer.name and self.optimizer.seen:
            found += unread("optimizer", self.config.optimizer, self.optimizer.seen)
        return found

    def batch_source(self, data: Corpus) -> BatchSource:
        """Make the source of the batches from ``data``; only the root calls this."""
        config = self.config
        sampler = Sampler(data.length("train"), config.model.context_length, config.train.seed)
        router = Router(self.comms.topology, self.routing, data.symmetry_group, data.counts, routed_together(config))
        return BatchSource(data, sampler, router, self.model.parameters.row_of_token, config.train.batch_size)

    def free(self) -> None:
        """Free everything except the communicators. Collective over the hierarchy."""
        self.reduction.free()


def assemble(
    config: Config,
    comms: Communicators,
    *,
    data: Corpus | None,
    state: RunState | None = None,
    progress: Progress | None = None,
    choices: Choices | None = None,
    known: str = "",
    stopping: StopRequests | None = None,
    faults: Sequence[Fault] = (),
    training: bool = True,
) -> Rank:
    """Assemble the parts of a rank. Collective over the hierarchy.

    Args:
        config: The resolved configuration, the same on every rank.
        comms: The hierarchy.
        data: The dataset, at the root; None elsewhere.
        state: The state to go on from, at the root; None initialises the model.
        progress: The counts of ``state``, on every rank.
        choices: Objects of the user's own.
        known: The reduction that an earlier start chose by time.
        stopping: The requests to stop on this rank.
        faults: The faults to inject.
        training: Whether the rank is to train; otherwise it has no optimizer and no memory for one.

    Raises:
        UserError: A part cannot be made; every rank raises it.
    """
    choices = choices or Choices()
    progress = dataclasses.replace(progress) if progress else Progress()
    use_threads(config.run.threads_per_rank, comms)
    if config.hierarchy.reproducible:
        require_one_kind(comms)
    with agreed(comms.world, comms.waiter):
        family = load_family(choices.family or config.model.family)
        rule = load_rule(choices.rule or config.optimizer.rule)
        schedule = load_schedule(config.optimizer.schedule)
        seen: set[str] = set()
        shape = watched(config.model, seen) if outside_family(family, config.model) else config.model
        specs = specs_of(family, shape)
        require_fit(rule, choices.rule or config.optimizer.rule, specs)
        if training:
            require_rates(config, schedule)
    classes = symmetry_classes(config, comms, data)
    table = SymmetryTable(classes, config.model.symmetry_order)
    layout = ParameterLayout(specs)
    ownership = ownership_of(config, comms.topology, layout, table.class_bounds, rule)
    vectors = Vectors(summed_type(config), slots_of(config), tuple(rule.state))
    chosen = make_reduction(choices.reduction or config.hierarchy.reduction, comms, ownership, vectors, known)
    reduction = guarded(chosen.reduction, chosen.name)
    sequences = micro_batch_sequences(config.model, config.train.micro_batch_size)
    with agreed(comms.world, comms.waiter):
        parameters = ParameterBuffer(specs, storage=reduction.parameter_slots(), symmetry=table)
        model = make_model(family, shape, parameters, sequences)
    slots = make_compute_slots(comms, model, config.run.threads_per_rank, outside_family(family, config.model))
    settings = OptimizerSettings(config.optimizer, config.train.grad_clip, config.train.steps, schedule)
    number = ownership.number(comms.rank)
    optimizer = None
    if training and number is not None:
        optimizer = Optimizer(
            parameters,
            settings,
            reduction.state_slots(),
            ownership,
            number,
            rule,
            table.class_bounds,
            load_kernels(),
            config.lattice.coupling,
            RULES.called(rule, choices.rule or config.optimizer.rule),
        )
    width = ID_COLUMNS + config.model.context_length + 1
    usual = max(config.train.batch_size, comms.topology.n_leaves)
    rank = Rank(
        config,
        comms,
        family,
        rule,
        choices.routing or config.hierarchy.routing,
        ownership,
        reduction,
        chosen.name,
        chosen.seconds,
        model,
        outside_family(family, config.model),
        slots,
        optimizer,
        settings.learning_rate,
        make_scatter(comms, width, usual, in_memory=reduction.shares_memory),
        Phases(comms.rank, comms.waiter, faults),
        stopping or NeverStop(),
        progress,
        training,
        seen,
    )
    spread_state(rank, state, config.train.seed)
    return rank


def require_rates(config: Config, schedule: Schedule) -> None:
    """Compute the first, middle and last rate of a schedule, so that an error in it is raised before any work.

    Args:
        config: The resolved configuration.
        schedule: The schedule.

    Raises:
        PluginError: A schedule from outside raised an exception or returned an invalid rate.
    """
    steps = config.train.steps
    settings = OptimizerSettings(config.optimizer, config.train.grad_clip, steps, schedule)
    for step in {0, steps // 2, max(steps - 1, 0)}:
        settings.learning_rate(step)


def symmetry_classes(config: Config, comms: Communicators, data: Corpus | None) -> NDArray[np.uint8]:
    """Give every rank the (V,) symmetry class of each token id. Collective over the hierarchy.

    Args:
        config: The resolved configuration.
        comms: The hierarchy.
        data: The dataset, at the root; None elsewhere.
    """
    shape = config.model
    classes = symmetry_groups(data.symmetry_group if data else None, shape.vocab_size, shape.symmetry_order)
    hand_down(comms, classes)
    return classes


def use_threads(threads: int, comms: Communicators) -> None:
    """Set the threads of this rank's BLAS, and warn where the ranks of the node then have more threads than cores."""
    if threads == 1:
        return
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads, user_api="blas")
    load_kernels().own_products = False  # hiermpi's own kernels use one thread
    cores = os.cpu_count() or 1
    if comms.rank == 0 and comms.node.size * threads > cores:
        logger.warning(
            "%d ranks of %d threads share the %d cores of this node: start fewer ranks, or lower "
            "run.threads_per_rank",
            comms.node.size,
            threads,
            cores,
        )


def require_one_kind(comms: Communicators) -> None:
    """Refuse ranks whose kernels or BLAS differ, since their results would differ in bits. Collective over the world.

    Raises:
        UserError: Two ranks differ; every rank raises it.
    """
    kinds = gather_objects(comms.world, arithmetic(), comms.waiter)
    with agreed(comms.world, comms.waiter):
        found = differing(kinds) if kinds else None
        if kinds and found:
            one, other = found
            raise UserError(
                f"hierarchy.reproducible: rank {one} computes with {kinds[one]}, rank {other} with {kinds[other]}: "
                "start on nodes of one kind, or set HIERMPI_KERNELS and OPENBLAS_CORETYPE to what all of them have"
            )


def arithmetic() -> str:
    """Describe what this rank's results depend on: its kernels, and its BLAS with the processor it is tuned for."""
    from threadpoolctl import threadpool_info

    libraries = {
        f"{entry['internal_api']} {entry.get('version')} for {entry.get('architecture', 'any processor')}"
        for entry in threadpool_info()
        if entry["user_api"] == "blas"
    }
    return f"{load_kernels().name} kernels and {' and '.join(sorted(libraries)) or 'an unknown BLAS'}"
