"""A checkpoint against a dataset: what ``hiermpi evaluate`` does, alone or on ranks."""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UserError
from hiermpi.model.transformer import Transformer
from hiermpi.training.batches import EvaluationSource
from hiermpi.training.evaluation import Evaluation, evaluate_alone

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.storage.checkpoint import Checkpoint
    from hiermpi.storage.dataset import TokenDataset

logger = logging.getLogger("hiermpi")


class Scored(NamedTuple):
    """A model and the data it is scored on."""

    checkpoint: "Checkpoint"
    dataset: "TokenDataset"
    model: Transformer


def score_alone(source: Path, data: Path, split: str) -> dict[str, str | float | int]:
    """The result of ``hiermpi evaluate``, computed by this process. Raises UserError."""
    scored = open_scored(source, data, split)
    return result_of(evaluate_alone(scored.model, windows_of(scored, split)), scored, split)


def score_together(source: Path, data: Path, split: str, world: "MPI.Comm") -> dict[str, str | float | int]:
    """The same, computed by all ranks; the result is whole on rank 0. Collective over ``world``."""
    from hiermpi.communication.agreement import agree, broadcast_object
    from hiermpi.communication.communicators import Communicators
    from hiermpi.communication.compute_slots import make_turns
    from hiermpi.communication.reduction import allreduce_small, hand_down
    from hiermpi.communication.scatter import BatchScatter
    from hiermpi.communication.waiting import Waiter
    from hiermpi.data.rows import ID_COLUMNS
    from hiermpi.training.evaluator import Evaluator

    scored, error = None, None
    if world.rank == 0:
        try:
            scored = open_scored(source, data, split)
        except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
            error = caught
    agree(world, error, Waiter())
    config: ModelConfig = broadcast_object(world, scored.model.config if scored else None, Waiter())
    comms = Communicators(world, config.symmetry_order)
    # Rows, not tokens, travel: the order of the rows matters at rank 0 only.
    model = scored.model if scored else Transformer(config, np.zeros(config.vocab_size, np.uint8))
    hand_down(comms, model.parameters.vector)
    scatter = BatchScatter(comms, ID_COLUMNS + config.context_length + 1)
    windows = windows_of(scored, split) if scored else None
    summing = partial(allreduce_small, comms)
    turns = make_turns(comms, model)
    evaluation = Evaluator(model, comms, scatter, summing, windows, 32 * comms.topology.n_leaves, turns).evaluate()
    comms.free()
    return result_of(evaluation, scored, split) if scored and evaluation else {}


def open_scored(source: Path, data: Path, split: str) -> Scored:
    """Open checkpoint and dataset and check that they fit. Raises UserError."""
    from hiermpi.storage.checkpoint import model_config
    from hiermpi.storage.dataset import open_dataset
    from hiermpi.training.loading import load_model, open_checkpoint

    checkpoint = open_checkpoint(source)
    dataset = open_dataset(data)
    without, vocab_size = tokenizer_from_json(checkpoint.tokenizer).kind == "none", model_config(checkpoint).vocab_size
    if without and dataset.vocab_size > vocab_size:
        raise UserError(
            f"{data} has {dataset.vocab_size} tokens, the model {vocab_size}: "
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
    return Scored(checkpoint, dataset, load_model(checkpoint, dataset.symmetry_group))


def windows_of(scored: Scored, split: str) -> EvaluationSource:
    """All windows of ``split``."""
    model = scored.model
    return EvaluationSource(scored.dataset, split, model.config.context_length, model.symmetry.row_of_token)


def result_of(evaluation: Evaluation, scored: Scored, split: str) -> dict[str, str | float | int]:
    """The keys that ``--json`` prints."""
    dataset = scored.dataset
    n_bytes = dataset.train_bytes if split == "train" else dataset.val_bytes
    return {
        "split": split,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte(dataset.length(split) / max(n_bytes, 1)),
        "tokens": evaluation.tokens,
    }
