"""Models are exported to and imported from other programs here, whatever the format.

A format is one object with the methods of :class:`Format` and one line in the registry of formats. It writes and
reads a checkpoint: a model's settings, its tensors by hiermpi's names in token order, and its tokenizer.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import FORMATS
from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import Tokenizer
from hiermpi.errors import UsageError, UserError
from hiermpi.files import told, whole_path
from hiermpi.model.contract import load_family, specs_of
from hiermpi.storage.checkpoint import Checkpoint, model_config

SHAPE = ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "symmetry_order", "tie_embeddings")
"""The settings of a model that an imported checkpoint always names; it names others where they are not the default."""


class Format(Protocol):
    """A way to write a model, and perhaps to read it."""

    suffix: str
    """The ending of a file that holds the whole model; it is empty where the model is always a folder."""
    file_names: tuple[str, ...]
    """The names of the files that a folder of this format may hold."""

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write the model into an empty folder; with a suffix, the file is called ``model`` and the suffix.

        Raises:
            UserError: The format cannot hold this model.
        """

    def accepts(self, source: Path) -> bool:
        """Return whether a folder or file holds a model of this format."""

    def read(self, source: Path) -> Checkpoint:
        """Read the model in a folder or file. Raises UserError."""


def export(checkpoint: Checkpoint, out: Path, kind: str, force: bool) -> Path:
    """Write the model of ``checkpoint`` in a registered format; the output is whole or it is not made.

    Args:
        checkpoint: The checkpoint; its state is not needed.
        out: The folder to make; for formats of one file it may also be a file with the format's ending.
        kind: The name of the format.
        force: Whether an existing file or folder at ``out`` is replaced.

    Returns:
        The path of the file or folder that was written.

    Raises:
        UserError: The model or the path cannot be used.
    """
    form: Format = FORMATS[kind]
    shape = model_config(checkpoint)
    fitted(shape, dict(checkpoint.parameters), "the checkpoint")
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists: name another --out, or add --force to replace it")
    if force and out.is_dir() and not is_export(out):
        raise UsageError(f"{out} is a folder with other things than an exported model: name another --out")
    with told(out.parent, "write into"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with told(out, "write"), whole_path(out) as temporary:
        temporary.mkdir()
        form.write(temporary, checkpoint)
        if form.suffix and out.suffix == form.suffix:
            beside = temporary.with_name(temporary.name + form.suffix)
            (temporary / f"model{form.suffix}").rename(beside)
            temporary.rmdir()
            beside.rename(temporary)
    return out


def is_export(folder: Path) -> bool:
    """Return whether everything in ``folder`` belongs to an exported model."""
    allowed = {name for kind in FORMATS for name in FORMATS[kind].file_names}
    return all(path.name in allowed or path.stem == "model" for path in folder.iterdir())


def read_model(source: Path) -> Checkpoint:
    """Read the model in a folder or file, as a checkpoint at step 0. Raises UserError."""
    if not source.exists():
        raise UserError(f"{source} does not exist: name a folder or a file with a model")
    for kind in FORMATS:
        form: Format = FORMATS[kind]
        if form.accepts(source):
            return form.read(source)
    known = {name for kind in FORMATS for name in FORMATS[kind].file_names}
    names = sorted(name for name in known if name.startswith(("config", "model")))
    raise UserError(f"{source} holds no {', '.join(names[:-1])} or {names[-1]}: name a folder with a model")


def imported(shape: ModelConfig, tensors: dict[str, NDArray[np.float32]], tokenizer: Tokenizer) -> Checkpoint:
    """Make a checkpoint at step 0 that belongs to no dataset; ``train --resume`` accepts it for any.

    Args:
        shape: The model's settings.
        tensors: The model's tensors by hiermpi's names, in token order.
        tokenizer: The model's tokenizer.
    """
    default = ModelConfig()
    names = [name for name in vars(shape) if name in SHAPE or getattr(shape, name) != getattr(default, name)]
    config: dict[str, Any] = {f"model.{name}": getattr(shape, name) for name in SHAPE}
    config |= {f"model.{name}": getattr(shape, name) for name in names if name in ("family", "options")}
    return Checkpoint(
        step=0,
        cursor=0,
        seed=0,
        adam_count=0,
        skipped_steps=0,
        config=config,
        tokenizer=tokenizer.to_json(),
        dataset_sha256="",
        parameters=tensors,
        state={},
        loss=float("nan"),
    )


def fitted(config: ModelConfig, found: dict[str, NDArray], source: str) -> dict[str, NDArray[np.float32]]:
    """Return those of the found tensors that the model has, as float32.

    Args:
        config: The model's settings.
        found: The tensors in the source.
        source: The name of the source, for messages.

    Raises:
        UserError: A tensor is missing, unknown, of another shape or not finite.
    """
    tensors = {}
    for spec in specs_of(load_family(config.family), config):
        if spec.name not in found:
            raise UserError(f"{source}: the tensor {spec.name} is missing: this is not a whole model of this shape")
        tensor = found[spec.name]
        if tensor.shape != spec.shape or tensor.dtype.kind != "f":
            raise UserError(
                f"{source}: the tensor {spec.name} is {tensor.dtype} of {tensor.shape}, expected floats of {spec.shape}"
            )
        if not np.isfinite(tensor).all():
            raise UserError(f"{source}: the tensor {spec.name} holds a value that is not finite: take another copy")
        tensors[spec.name] = np.ascontiguousarray(tensor, np.float32)
    unknown = sorted(found.keys() - tensors.keys())
    if unknown:
        raise UserError(f"{source}: unknown tensors {', '.join(unknown[:4])}: this is not a {config.family} model")
    return tensors
