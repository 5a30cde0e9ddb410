"""Checkpoints hold everything that a run needs to go on, on any number of ranks.

Tensors are stored by name in token order, so no rank count and no layout is in the file.
"""

import hashlib
import json
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.errors import DamagedFile, UserError
from hiermpi.files import TEMPORARY_SUFFIX, file_errors
from hiermpi.storage.container import (
    IN_MEMORY_LIMIT,
    Fill,
    Reader,
    build_image,
    open_container,
    verify,
    write_image,
    write_streamed,
)

import h5py  # isort: skip

Tensors = dict[str, NDArray[np.float32]]

KIND = "checkpoint"
FILE_NAME = re.compile(r"step-(\d{8,})\.h5")
CHUNK = 1 << 18

logger = logging.getLogger("hiermpi")


@dataclass
class Checkpoint:
    """The state of a run after ``step`` steps."""

    step: int
    cursor: int
    """The number of sequences that the sampler has drawn."""
    seed: int
    adam_count: int
    """The number of updates that were applied: the steps less the skipped ones."""
    skipped_steps: int
    config: dict[str, Any]
    """The settings of the run as ``{"section.field": value}``."""
    tokenizer: str
    dataset_sha256: str
    parameters: Tensors
    state: dict[str, Tensors]
    """The optimizer's tensors by the names of the rule's vectors: ``m`` and ``v`` for AdamW."""
    loss: float
    """The loss of the last step that was not skipped, in nats per token."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file is whole or it is not made. Raises UserError."""
    if data_bytes(checkpoint) <= IN_MEMORY_LIMIT:
        write_image(path, checkpoint_image(checkpoint))
    else:
        write_streamed(path, KIND, filler(checkpoint), data_bytes(checkpoint))


def checkpoint_image(checkpoint: Checkpoint) -> memoryview:
    """Build the checkpoint's file in memory. Raises UserError where a value is not finite."""
    return build_image(KIND, filler(checkpoint))


def filler(checkpoint: Checkpoint) -> Fill:
    """Return the function that writes a checkpoint into an HDF5 file. Raises UserError where a value is not finite."""
    require_loadable(checkpoint)

    def fill(file: h5py.File) -> None:
        for group, tensors in groups_of(checkpoint).items():
            for name, tensor in tensors.items():
                file.create_dataset(f"{group}/{name}", data=tensor)
        for name in ("cursor", "seed", "adam_count", "skipped_steps", "loss", "tokenizer", "dataset_sha256"):
            file.attrs[name] = getattr(checkpoint, name)
        file.attrs["config"] = json.dumps(checkpoint.config)
        file.attrs["step"] = checkpoint.step

    return fill


def require_loadable(checkpoint: Checkpoint) -> None:
    """Refuse to save what :func:`load_checkpoint` would refuse, since older, loadable checkpoints are deleted for it.

    Raises UserError where a value is not finite, ValueError where names, shapes or types are wrong.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.parameters.items()}
    for group, tensors in groups_of(checkpoint).items():
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ValueError(f"the names or shapes of {group} are not those of the parameters")
        for name, tensor in tensors.items():
            if tensor.dtype != np.float32 or "/" in name or not name.isprintable():
                raise ValueError(f"{group}/{name!r} of {tensor.dtype} cannot be stored")
            if not np.isfinite(tensor).all():
                raise UserError(
                    f"step {checkpoint.step} is not saved: {group}/{name} holds a value that is not finite: "
                    "go on from the last checkpoint with a lower optimizer.learning_rate or train.grad_clip"
                )


def groups_of(checkpoint: Checkpoint) -> dict[str, Tensors]:
    """Return the tensors by their group in the file."""
    return {"parameters": checkpoint.parameters} | {f"optimizer/{k}": t for k, t in checkpoint.state.items()}


def data_bytes(checkpoint: Checkpoint) -> int:
    """Return the size of all tensors in bytes."""
    return sum(tensor.nbytes for tensors in groups_of(checkpoint).values() for tensor in tensors.values())


def load_checkpoint(path: Path, with_state: bool = True) -> Checkpoint:
    """Read and check a checkpoint. Raises UserError, DamagedFile.

    Args:
        path: The file of the checkpoint.
        with_state: Whether to read the optimizer's state.
    """
    with open_container(path, KIND) as reader:
        parameters = _tensors(reader, "parameters")
        shapes = {name: tensor.shape for name, tensor in parameters.items()}
        names = reader.names("optimizer") if with_state and reader.has("optimizer") else []
        state = {name: _tensors(reader, f"optimizer/{name}") for name in names}
        for name, tensors in state.items():
            if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
                raise reader.refuse(f"/optimizer/{name} does not match /parameters")
        return Checkpoint(
            step=reader.integer("step"),
            cursor=reader.integer("cursor"),
            seed=reader.integer("seed"),
            adam_count=reader.integer("adam_count"),
            skipped_steps=reader.integer("skipped_steps"),
            config=_config(reader),
            tokenizer=reader.text("tokenizer"),
            dataset_sha256=reader.text("dataset_sha256"),
            parameters=parameters,
            state=state,
            loss=reader.number("loss"),
        )


def parameters_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 (hex) of the parameters by name; equal models have equal digests, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.parameters):
        tensor = checkpoint.parameters[name]
        digest.update(f"{name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4").data)
    return digest.hexdigest()


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return the shape of the model in ``checkpoint``. Raises DamagedFile where its settings are not valid."""
    prefix = "model."
    shape = {name.removeprefix(prefix): value for name, value in checkpoint.config.items() if name.startswith(prefix)}
    try:
        return ModelConfig(**shape)
    except (TypeError, ValueError) as error:
        raise DamagedFile(f"the checkpoint's model settings are not valid: {error}") from None


def _tensors(reader: Reader, group: str) -> Tensors:
    tensors = {name: reader.array(f"{group}/{name}", ("float32",)) for name in reader.names(group)}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise reader.refuse(f"/{group}/{name} holds a value that is not finite")
    return tensors


def _config(reader: Reader) -> dict[str, Any]:
    try:
        config = json.loads(reader.text("config"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not all(_plain(value) for value in config.values()):
        raise reader.refuse("the attribute config is not a JSON object of settings")
    return config


def _plain(value: Any) -> bool:
    """Return whether this is the value of a setting: a number, a text, or a table of these (``model.options``)."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(entry, int | float | str | bool) for entry in values)


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        path: The folder RUN/checkpoints, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def path_for(self, step: int) -> Path:
        """Return the path of the checkpoint after ``step`` steps."""
        return self.path / f"step-{step:08d}.h5"

    def list(self) -> list[tuple[int, Path]]:
        """Return (step, path) of every checkpoint, newest first."""
        if not self.path.is_dir():
            return []
        with file_errors(self.path, "read"):
            found = [(FILE_NAME.fullmatch(path.name), path) for path in self.path.iterdir() if path.is_file()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def newest_valid(self, with_state: bool = True) -> tuple[Path, Checkpoint] | None:
        """Return the newest checkpoint that is whole, or None where there is none; damaged ones are logged and skipped.

        Raises UserError where there are checkpoints, and all are damaged.
        """
        entries = self.list()
        for _, path in entries:
            try:
                return path, load_checkpoint(path, with_state)
            except DamagedFile as error:
                logger.warning("%s; trying the checkpoint before it", error)
        if entries:
            raise UserError(f"every checkpoint in {self.path} is damaged: put back a copy, or name another --run")
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than ``step``, which a run that goes back to it must not find again."""
        for newer, path in self.list():
            if newer > step:
                with file_errors(path, "rename"):
                    path.rename(path.with_name(path.name + ".superseded"))
                logger.info("%s is set aside as %s.superseded", path, path.name)

    def remove_leftovers(self) -> None:
        """Delete the temporary files of a writer that was killed."""
        if self.path.is_dir():
            for path in self.path.glob(f"*{TEMPORARY_SUFFIX}"):
                with file_errors(path, "remove"):
                    path.unlink(missing_ok=True)

    def retain(self, keep_last: int, keep_every: int) -> None:
        """Delete all but the newest ``keep_last`` checkpoints and those of multiples of ``keep_every``.

        Nothing is deleted unless the newest checkpoint is whole on disk, and that one is never deleted.
        """
        entries = self.list()
        surplus = [path for step, path in entries[max(1, keep_last) :] if not (keep_every and step % keep_every == 0)]
        if not surplus:
            return
        try:
            verify(entries[0][1])
        except DamagedFile as error:
            logger.warning("%s; older checkpoints are kept", error)
            return
        for path in surplus:
            with file_errors(path, "remove"):
                path.unlink(missing_ok=True)


class CheckpointWriter:
    """A writer that saves checkpoints one at a time, in a thread if asked to.

    Args:
        folder: The folder that receives the checkpoints.
        asynchronous: Whether to write in a thread; the checkpoint's arrays must then not change until it has ended.
        keep_last: The number of newest checkpoints to keep; see :meth:`CheckpointFolder.retain`.
        keep_every: The multiple of steps whose checkpoints are kept; see :meth:`CheckpointFolder.retain`.
    """

    def __init__(self, folder: CheckpointFolder, asynchronous: bool, keep_last: int, keep_every: int) -> None:
        self.folder = folder
        self.asynchronous = asynchronous
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint. Raises UserError where this save, or the asynchronous one before it, failed."""
        self.finish()
        with file_errors(self.folder.path, "make"):
            self.folder.path.mkdir(parents=True, exist_ok=True)
        if not self.asynchronous:
            self._write(checkpoint)
            return
        self._thread = threading.Thread(target=self._write_and_remember, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save that is running, if any. Raises UserError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_and_remember(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except Exception as error:  # noqa: BLE001  (raised by finish)
            self._error = error

    def _write(self, checkpoint: Checkpoint) -> None:
        save_checkpoint(self.folder.path_for(checkpoint.step), checkpoint)
        self.folder.retain(self.keep_last, self.keep_every)
