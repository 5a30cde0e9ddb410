"""Rank 0 checks and opens before any work: configuration, dataset, run folder, checkpoint and model family."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config, flatten
from hiermpi.data.sequences import Sampler
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UsageError
from hiermpi.kernels import load_kernels
from hiermpi.model.contract import Family, family_of, make_model, micro_batch_sequences, specs_of
from hiermpi.model.generation import Sampling
from hiermpi.model.generation import generate as generate_tokens
from hiermpi.model.parameters import ParameterBuffer, SymmetryTable, require_tensors, symmetry_groups
from hiermpi.storage.checkpoint import Checkpoint, load_checkpoint, model_config
from hiermpi.storage.dataset import TokenDataset, open_dataset
from hiermpi.storage.run_folder import RunFolder

FIXED_SETTINGS = ("model.", "train.batch_size", "train.seed", "optimizer.rule")
"""The settings that a resumed run may not change; any other may change, and the change is logged."""
OLDER_SETTINGS = {"model.family": "gpt2", "model.options": {}, "optimizer.rule": "adamw"}
"""The values of settings that older checkpoints do not name."""

logger = logging.getLogger("hiermpi")


@dataclass
class OpenedRun:
    """The objects that rank 0 holds for a run."""

    config: Config
    """The resolved configuration: its vocabulary size is the model's."""
    dataset: TokenDataset
    folder: RunFolder
    checkpoint: Checkpoint | None
    """The checkpoint from which the run goes on; None starts from the beginning."""
    goes_back: bool
    """This is true if the user asked for an earlier state; everything later in the run folder is then set aside."""
    finished: bool
    """This is true if the run is already done, so that there is nothing to do."""


def open_run(config: Config, data: Path, run: Path, resume: str, family: Family, n_ranks: int) -> OpenedRun:
    """Open a run. Raises UserError before anything is changed.

    Args:
        config: The configuration as the user gave it.
        data: The dataset.
        run: The run folder.
        resume: The word ``auto``, ``none``, or the path of a checkpoint.
        family: The family of the model, which may refuse its settings.
        n_ranks: The number of ranks.
    """
    refuse_unavailable(config)
    load_kernels()  # this refuses a HIERMPI_KERNELS that the processor does not have
    cores = os.cpu_count() or 1
    if config.run.threads_per_rank > cores:
        raise UsageError(f"run.threads_per_rank = {config.run.threads_per_rank}, but this node has {cores} cores")
    if config.run.min_ranks > n_ranks:
        raise UsageError(f"run.min_ranks = {config.run.min_ranks}, but there are {n_ranks} ranks: start more")
    dataset = open_dataset(data)
    config = fit_to_data(config, dataset)
    specs_of(family, config.model)  # this refuses settings that do not go together
    folder = RunFolder(run)
    folder.prepare()
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        require_same_run(config, dataset, checkpoint)
    done = checkpoint is not None and folder.is_done() and checkpoint.step >= config.train.steps
    return OpenedRun(config, dataset, folder, checkpoint, resume != "auto", done)


def refuse_unavailable(config: Config) -> None:
    """Refuse settings that this version does not implement yet. Raises UsageError."""
    if config.run.on_failure == "shrink":
        raise UsageError(
            "run.on_failure = shrink is not available in this version: use abort, and start the same command again "
            "after a failure"
        )


def fit_to_data(config: Config, dataset: TokenDataset) -> Config:
    """Return ``config`` with the vocabulary size resolved. Raises UsageError where model and data do not agree."""
    model = config.model
    if model.symmetry_order != dataset.symmetry_order:
        raise UsageError(
            f"model.symmetry_order = {model.symmetry_order}, but {dataset.path} was prepared with "
            f"{dataset.symmetry_order}: make them equal, or prepare the data again"
        )
    if model.vocab_size and model.vocab_size < dataset.vocab_size:
        raise UsageError(
            f"model.vocab_size = {model.vocab_size} is below the {dataset.vocab_size} tokens of {dataset.path}: "
            "use 0 to take the data's"
        )
    try:
        Sampler(dataset.length("train"), model.context_length, 0)
    except ValueError as error:
        raise UsageError(f"{dataset.path}: {error}") from None
    vocab_size = model.vocab_size or dataset.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size))


def find_checkpoint(folder: RunFolder, resume: str) -> Checkpoint | None:
    """Return the checkpoint that ``--resume`` asks for. Raises UserError where it is missing or damaged."""
    if resume == "none":
        return None
    if resume == "auto":
        newest = folder.checkpoints.newest_valid()
        return newest[1] if newest else None
    return load_checkpoint(Path(resume))


def require_same_run(config: Config, dataset: TokenDataset, checkpoint: Checkpoint) -> None:
    """Refuse to resume with another model, batch, seed or dataset, and log what else has changed.

    Args:
        config: The resolved configuration.
        dataset: The dataset of this start.
        checkpoint: The checkpoint from which the run goes on.

    Raises:
        UsageError: A setting or dataset that must not change differs from the checkpoint's.
    """
    if not checkpoint.dataset_sha256:
        require_same_tokens(dataset, checkpoint.tokenizer)
    elif checkpoint.dataset_sha256 != dataset.sha256:
        raise UsageError(
            f"the run was trained on a dataset with SHA-256 {checkpoint.dataset_sha256[:16]}..., {dataset.path} has "
            f"{dataset.sha256[:16]}...: name the same dataset, or another --run"
        )
    now = flatten(config)
    for name, before in (OLDER_SETTINGS | checkpoint.config).items():
        if name not in now or now[name] == before:
            continue
        if name.startswith(FIXED_SETTINGS) and not (name == "optimizer.rule" and not checkpoint.adam_count):
            raise UsageError(
                f"{name} = {now[name]}, but the run was started with {before}: use the same, or name another --run"
            )
        logger.info("%s changes from %s to %s", name, before, now[name])


def require_same_tokens(dataset: TokenDataset, tokenizer: str) -> None:
    """Refuse an imported model with another tokenizer than the data's. Raises UsageError."""
    if tokenizer != dataset.tokenizer and tokenizer_from_json(tokenizer).kind != "none":
        raise UsageError(
            f"{dataset.path} was prepared with another tokenizer than the imported model's: prepare it with "
            "--tokenizer-of and the imported checkpoint"
        )


def describe_start(opened: OpenedRun) -> str:
    """Describe in one line whether the run starts anew or from which checkpoint."""
    if opened.checkpoint is None:
        return f"starting {opened.folder.path}"
    if not opened.checkpoint.dataset_sha256:
        return f"starting {opened.folder.path} from an imported model"
    return f"continuing {opened.folder.path} after step {opened.checkpoint.step} of {opened.config.train.steps}"


def open_checkpoint(source: Path) -> Checkpoint:
    """Open the file ``source``, or the newest whole checkpoint of the run in folder ``source``, without its state."""
    if source.is_dir():
        return RunFolder(source).newest_checkpoint()[1]
    return load_checkpoint(source, with_state=False)


def load_model(
    checkpoint: Checkpoint, symmetry_group: NDArray[np.uint8] | None = None, family: Family | None = None
) -> Any:
    """Make the model of a checkpoint with its parameters.

    Args:
        checkpoint: The checkpoint; its state is not needed.
        symmetry_group: The symmetry class of each token id; by default ids modulo the order.
        family: The family of the model; by default the registered one that the checkpoint names.

    Raises:
        DamagedFile: Tensors do not fit the model's settings.
    """
    shape = model_config(checkpoint)
    family = family or family_of(shape, None, Path("the checkpoint"))
    specs = specs_of(family, shape)
    require_tensors(specs, checkpoint.parameters, "the checkpoint")
    groups = symmetry_groups(symmetry_group, shape.vocab_size, shape.symmetry_order)
    parameters = ParameterBuffer(specs, symmetry=SymmetryTable(groups, shape.symmetry_order))
    model = make_model(family, shape, parameters, micro_batch_sequences(shape))
    parameters.load_token_order(checkpoint.parameters, parameters.vector)
    return model


def generate(
    source: Path | str,
    prompt: str,
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    family: Any = None,
) -> str:
    """Continue a text with a trained model.

    Args:
        source: A run folder, whose newest checkpoint is taken, or the file of a checkpoint.
        prompt: The text, at least one character.
        tokens: The number of tokens to add.
        temperature: The temperature of the choices; 0 takes the likeliest token.
        top_k: The number of likeliest tokens to choose among; 0 allows all.
        top_p: The probability that the likeliest tokens to choose among have together.
        seed: The seed of the choices.
        family: The model's family, where it comes from outside the package: a text or an object.

    Returns:
        The prompt and the text that follows it.

    Raises:
        UserError: The checkpoint cannot be used, or its model gives no logits.
    """
    checkpoint = open_checkpoint(Path(source))
    shape = model_config(checkpoint)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    model = load_model(checkpoint, family=family_of(shape, family, Path(source)))
    start = [int(token) for token in tokenizer.encode(prompt.encode())]
    how = Sampling(temperature, top_k, top_p)
    found = generate_tokens(model, start, tokens, seed, how, shape.context_length, tokenizer.vocab_size)
    return prompt + tokenizer.decode(list(found)).decode("utf-8", "replace")
