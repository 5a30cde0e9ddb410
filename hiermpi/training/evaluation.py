"""The mean loss over a split is computed by this process alone, or by the leaves of the hierarchy in even parts.

Windows are computed in units of a fixed size, and the sums of their losses are rounded so that they add up exactly: the
result is the same to the last bit on any number of ranks.
"""

import logging
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config, HierarchyConfig, ModelConfig, TrainConfig
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UserError
from hiermpi.hierarchy.routing import even_leaves
from hiermpi.model.contract import Family, Model, family_of, loss_of, outside_family
from hiermpi.optimizer.sums import rounded_loss
from hiermpi.training.batches import EvaluationSource, records_to_batch

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.storage.checkpoint import Checkpoint
    from hiermpi.storage.dataset import TokenDataset
    from hiermpi.training.assembly import Rank

EVALUATION_UNIT = 8
"""The number of windows that are computed together, whatever the number of ranks."""
UNITS_AT_ONCE = 4
"""The number of units of each leaf in one exchange of ``evaluate``."""

logger = logging.getLogger("hiermpi")


class Evaluation(NamedTuple):
    """The result of an evaluation over a split."""

    loss: float
    """The mean loss over tokens, in nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """The perplexity exp(loss), capped where a float overflows."""
        return exp(min(self.loss, 700.0))

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Return the loss in bits per byte of the text."""
        return self.loss / log(2.0) * tokens_per_byte


def loss_in_units(model: Model, rows: NDArray[np.int32], outside: str = "") -> tuple[float, int]:
    """Add up the loss and the targets of windows unit by unit; the bits do not depend on which rank computes a unit.

    Args:
        model: The model.
        rows: The windows, as rows.
        outside: The text by which messages name a model family from outside the package.
    """
    loss, tokens = 0.0, 0
    for first in range(0, len(rows), EVALUATION_UNIT):
        part = loss_of(model, records_to_batch(rows[first : first + EVALUATION_UNIT], 0, 0), outside)
        loss, tokens = loss + rounded_loss(part[0]), tokens + part[1]
    return loss, tokens


def evaluate_alone(model: Model, source: EvaluationSource, outside: str = "") -> Evaluation:
    """Compute the mean loss over ``source`` in this process.

    Args:
        model: The model.
        source: The windows.
        outside: The text by which messages name a model family from outside the package.
    """
    loss, tokens = 0.0, 0
    for first in range(0, len(source), EVALUATION_UNIT):
        part = loss_in_units(model, source.records(first, min(first + EVALUATION_UNIT, len(source))), outside)
        loss, tokens = loss + part[0], tokens + part[1]
    return Evaluation(loss / max(tokens, 1), tokens)


class Evaluator:
    """An evaluator of a model on the hierarchy, which distributes the windows evenly over the leaves.

    The constructor is collective over the hierarchy, like :meth:`evaluate`.

    Args:
        rank: The parts of this rank.
        source: The windows, at the root; None elsewhere.
        batch_size: The number of windows in an exchange, rounded up to whole units for each leaf.
    """

    def __init__(self, rank: "Rank", source: EvaluationSource | None, batch_size: int) -> None:
        self.rank = rank
        self.source = source
        leaves = rank.comms.topology.n_leaves
        per_leaf = -(-batch_size // (leaves * EVALUATION_UNIT))
        self.batch_size = per_leaf * leaves * EVALUATION_UNIT
        windows = np.array([0 if source is None else len(source)], np.float64)
        rank.reduction.sum_everywhere(windows)
        self.n_windows = int(windows[0])

    def evaluate(self) -> Evaluation | None:
        """Return the mean loss on every rank, or None where some rank wants to stop. Collective over the hierarchy."""
        total = np.zeros(2)
        for first in range(0, self.n_windows, self.batch_size):
            last = min(first + self.batch_size, self.n_windows)
            rows, leaf = None, None
            if self.source is not None:
                rows = self.source.records(first, last)
                units = -(-len(rows) // EVALUATION_UNIT)
                leaf = np.repeat(even_leaves(units, self.rank.comms.topology), EVALUATION_UNIT)[: len(rows)]
            sums = self._loss(self.rank.scatter.scatter(rows, leaf))
            self.rank.reduction.sum_everywhere(sums)
            if sums[2]:
                return None
            total += sums[:2]
        return Evaluation(float(total[0] / max(total[1], 1.0)), int(total[1]))

    def _loss(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        loss, tokens = 0.0, 0
        if len(rows):
            with self.rank.slots:
                loss, tokens = loss_in_units(self.rank.model, rows, self.rank.outside_model)
        return np.array([loss, tokens, float(self.rank.stopping.requested())])


class Scored(NamedTuple):
    """A checkpoint and the data that it is evaluated on, at rank 0."""

    checkpoint: "Checkpoint"
    dataset: "TokenDataset"
    family: Family
    shape: ModelConfig


Result = dict[str, str | float | int]


def evaluate(
    source: Path | str,
    data: Path | str,
    split: str = "val",
    *,
    family: Any = None,
    comm: "MPI.Comm | None" = None,
) -> Result:
    """Evaluate a checkpoint over a whole split of a dataset.

    Args:
        source: A run folder, whose newest checkpoint is taken, or the file of a checkpoint.
        data: The dataset.
        split: The name of the split, ``train`` or ``val``.
        family: The model's family, where it comes from outside the package: a text or an object.
        comm: The communicator of the ranks that compute together, which all call this function; with None this process
            computes alone, without MPI.

    Returns:
        The keys ``split``, ``loss`` (nats per token), ``perplexity``, ``bits_per_byte`` and ``tokens``; with ``comm``
        on rank 0, and an empty table elsewhere.

    Raises:
        UserError: Checkpoint and data do not fit, or cannot be read.
    """
    if comm is not None:
        return _evaluate_together(Path(source), Path(data), split, family, comm)
    from hiermpi.training.opening import load_model

    scored = open_scored(Path(source), Path(data), split, family)
    model = load_model(scored.checkpoint, scored.dataset.symmetry_group, scored.family)
    windows = EvaluationSource(scored.dataset, split, scored.shape.context_length, model.parameters.row_of_token)
    return result_of(evaluate_alone(model, windows, outside_family(scored.family, scored.shape)), scored, split)


def _evaluate_together(source: Path, data: Path, split: str, family: Any, comm: "MPI.Comm") -> Result:
    from hiermpi.communication.agreement import from_root
    from hiermpi.communication.communicators import Communicators
    from hiermpi.communication.waiting import Waiter
    from hiermpi.training.assembly import Choices, assemble
    from hiermpi.training.state import Progress, RunState

    opened: list[Scored] = []

    def open_here() -> ModelConfig:
        opened.append(open_scored(source, data, split, family))
        return opened[0].shape

    shape = from_root(comm, open_here, Waiter())
    scored = opened[0] if opened else None
    comms = Communicators(comm, shape.symmetry_order)
    batch_size = UNITS_AT_ONCE * EVALUATION_UNIT * comms.topology.n_leaves
    config = Config(
        model=shape,
        train=TrainConfig(batch_size=batch_size),
        hierarchy=HierarchyConfig(reduction="flat"),  # its memory is what a model needs, and no more
    )
    rank = assemble(
        config,
        comms,
        data=scored.dataset if scored else None,
        state=RunState(Progress(), scored.checkpoint.parameters) if scored else None,
        choices=Choices(family=family),
        training=False,
    )
    windows = None
    if scored:
        table = rank.model.parameters.row_of_token
        windows = EvaluationSource(scored.dataset, split, shape.context_length, table)
    evaluation = Evaluator(rank, windows, batch_size).evaluate()
    rank.free()
    comms.free()
    return result_of(evaluation, scored, split) if scored and evaluation else {}


def open_scored(source: Path, data: Path, split: str, family: Any) -> Scored:
    """Open checkpoint and dataset, and check that they fit.

    Args:
        source: A run folder, or the file of a checkpoint.
        data: The dataset.
        split: The name of the split.
        family: The model's family, where it comes from outside the package.

    Raises:
        UserError: Checkpoint and data do not fit, or cannot be read.
    """
    from hiermpi.storage.checkpoint import model_config
    from hiermpi.storage.dataset import open_dataset
    from hiermpi.training.opening import open_checkpoint

    checkpoint = open_checkpoint(source)
    dataset = open_dataset(data)
    shape = model_config(checkpoint)
    found = family_of(shape, family, source)
    without = tokenizer_from_json(checkpoint.tokenizer).kind == "none"
    if without and dataset.vocab_size > shape.vocab_size:
        raise UserError(
            f"{data} has {dataset.vocab_size} tokens, the model {shape.vocab_size}: "
            "evaluate on data of the model's own tokenizer"
        )
    if without:
        logger.warning("%s came without a tokenizer: the token ids of %s are taken as they are", source, data)
    elif checkpoint.tokenizer != dataset.tokenizer:
        raise UserError(
            f"{data} was prepared with another tokenizer than the data {source} was trained on: "
            "prepare it with --tokenizer-of and that data or checkpoint"
        )
    if dataset.length(split) < 2:
        raise UserError(f"{data}: the split {split} has {dataset.length(split)} tokens: at least 2 are needed")
    return Scored(checkpoint, dataset, found, shape)


def result_of(evaluation: Evaluation, scored: Scored, split: str) -> Result:
    """Return the result with the keys that ``--json`` prints.

    Args:
        evaluation: The result over the split.
        scored: The checkpoint and the data.
        split: The name of the split.
    """
    dataset = scored.dataset
    n_bytes = dataset.train_bytes if split == "train" else dataset.val_bytes
    return {
        "split": split,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte(dataset.length(split) / max(n_bytes, 1)),
        "tokens": evaluation.tokens,
    }
