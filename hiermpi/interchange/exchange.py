"""Models are exported to and imported from other programs here, whatever the format.

A format is one object with the methods of :class:`Format` and one line in the registry of formats. It writes and
reads a checkpoint: a model's settings, its tensors by hiermpi's names in token order, and its tokenizer.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import FORMATS
from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import Tokenizer
from hiermpi.errors import PluginError, UsageError, UserError, plugin_errors
from hiermpi.files import file_errors, whole_path
from hiermpi.model.contract import Family, family_of, specs_of
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


def load_format(choice: Any) -> Format:
    """Load a format and check that it keeps the contract.

    Args:
        choice: A registered name, ``package.module:object``, or the format itself.

    Raises:
        UsageError: There is no such format.
        PluginError: The format does not keep the contract.
    """
    what = FORMATS.described(choice)
    form = FORMATS.load(choice) if isinstance(choice, str) else choice
    with plugin_errors(what):
        form = form() if isinstance(form, type) else form
        if not callable(getattr(form, "write", None)):
            raise PluginError(f"{what}: it has no method write")
        suffix, names = getattr(form, "suffix", None), getattr(form, "file_names", None)
        if not isinstance(suffix, str) or (suffix and not suffix.startswith(".")):
            raise PluginError(f"{what}: its `suffix` must be '' or the ending of a file, as '.bin', not {suffix!r}")
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise PluginError(f"{what}: its `file_names` must be a tuple of names of files, not {names!r}")
    return form


def export(checkpoint: Checkpoint, out: Path, kind: Any, force: bool, family: Family | None = None) -> Path:
    """Write the model of ``checkpoint`` in a format; the output is whole or it is not made.

    Args:
        checkpoint: The checkpoint; its state is not needed.
        out: The folder to make; for formats of one file it may also be a file with the format's ending.
        kind: The name of the format, ``package.module:object``, or the format itself.
        force: Whether an existing file or folder at ``out`` is replaced.
        family: The family of the model; by default the registered one that the checkpoint names.

    Returns:
        The path of the file or folder that was written.

    Raises:
        UserError: The model or the path cannot be used.
    """
    form = load_format(kind)
    outside = FORMATS.blamed(kind)
    shape = model_config(checkpoint)
    fitted(shape, dict(checkpoint.parameters), "the checkpoint", family)
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists: name another --out, or add --force to replace it")
    if force and out.is_dir() and not is_export(out, form.file_names):
        raise UsageError(f"{out} is a folder with other things than an exported model: name another --out")
    with file_errors(out.parent, "write into"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with file_errors(out, "write"), whole_path(out) as temporary:
        temporary.mkdir()
        with plugin_errors(outside):
            form.write(temporary, checkpoint)
        written = temporary / f"model{form.suffix}" if form.suffix else next(temporary.iterdir(), temporary / "it")
        if outside and not written.exists():
            raise PluginError(f"{outside}: write() has not made {written.name if form.suffix else 'any file'}")
        if form.suffix and out.suffix == form.suffix:
            beside = temporary.with_name(temporary.name + form.suffix)
            (temporary / f"model{form.suffix}").rename(beside)
            temporary.rmdir()
            beside.rename(temporary)
    return out


def is_export(folder: Path, names: Sequence[str] = ()) -> bool:
    """Return whether every entry of ``folder`` belongs to an exported model or has one of ``names``."""
    allowed = {name for kind in FORMATS for name in FORMATS[kind].file_names} | set(names)
    return all(path.name in allowed or path.stem == "model" for path in folder.iterdir())


def read_model(source: Path, kind: Any = None, family: Any = None) -> Checkpoint:
    """Read the model in a folder or file, as a checkpoint at step 0.

    Args:
        source: The folder or file.
        kind: The format, as in :func:`export`; by default the registered one that accepts the source.
        family: The family of the model, a text or an object, where it comes from outside the package.

    Raises:
        UserError: There is no such model, or its family comes from outside the package and was not given.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist: name a folder or a file with a model")
    if kind is None:
        kind = format_of(source)
    form, what = load_format(kind), FORMATS.described(kind)
    if not callable(getattr(form, "read", None)):
        raise UserError(f"{what} cannot be imported: it has no method read")
    outside = FORMATS.blamed(kind)
    with plugin_errors(outside):
        checkpoint = form.read(source)
    if not isinstance(checkpoint, Checkpoint):
        raise PluginError(f"{what}: read() returned {type(checkpoint).__name__}, not a Checkpoint")
    shape = model_config(checkpoint)
    found = family_of(shape, family, source)
    name = f"{outside}: {source}" if outside else str(source)
    return dataclasses.replace(checkpoint, parameters=fitted(shape, dict(checkpoint.parameters), name, found))


def format_of(source: Path) -> str:
    """Return the name of the registered format of the model in a folder or file. Raises UserError."""
    for name in FORMATS:
        if FORMATS[name].accepts(source):
            return name
    known = {file for name in FORMATS for file in FORMATS[name].file_names}
    files = sorted(file for file in known if file.startswith(("config", "model")))
    raise UserError(f"{source} holds no {', '.join(files[:-1])} or {files[-1]}: name a folder with a model")


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


def fitted(
    config: ModelConfig, found: dict[str, NDArray], source: str, family: Family | None = None
) -> dict[str, NDArray[np.float32]]:
    """Return those of the found tensors that the model has, as float32.

    Args:
        config: The model's settings.
        found: The tensors by hiermpi's names, in token order.
        source: The name of the source, for messages.
        family: The family of the model; by default the registered one that the settings name.

    Raises:
        UserError: Tensors do not fit, or the family comes from outside the package and was not given.
    """
    tensors = {}
    for spec in specs_of(family or family_of(config, None, Path(source)), config):
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
