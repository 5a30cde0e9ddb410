"""The formats of one file with tensors by hiermpi's names, settings and tokenizer: safetensors and numpy's npz."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import is_outside
from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import DamagedFile, UserError
from hiermpi.interchange.exchange import fitted, imported
from hiermpi.storage.checkpoint import Checkpoint, model_config

MODEL, TOKENIZER = "hiermpi.model", "hiermpi.tokenizer"
"""The keys of the two descriptions beside the tensors."""


class Safetensors:
    """The format of tensors in a safetensors file (extra ``export``), with the descriptions in its metadata."""

    suffix = ".safetensors"
    file_names = ("model.safetensors",)

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        save_tensors(folder / "model.safetensors", checkpoint.parameters, descriptions(checkpoint))

    def accepts(self, source: Path) -> bool:
        return (source / "model.safetensors").exists() if source.is_dir() else source.suffix != ".npz"

    def read(self, source: Path) -> Checkpoint:
        path = source / "model.safetensors" if source.is_dir() else source
        tensors, metadata = load_tensors(path)
        return assembled(tensors, metadata, path)


class Npz:
    """The format of arrays in numpy's npz, with the descriptions as texts beside them."""

    suffix = ".npz"
    file_names = ("model.npz",)

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        texts = {name: np.array(text) for name, text in descriptions(checkpoint).items()}
        with open(folder / "model.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **checkpoint.parameters, **texts)

    def accepts(self, source: Path) -> bool:
        return (source / "model.npz").exists() if source.is_dir() else source.suffix == ".npz"

    def read(self, source: Path) -> Checkpoint:
        path = source / "model.npz" if source.is_dir() else source
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves it open on errors
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read as npz: {reason}") from None
        texts = {name: str(arrays.pop(name)) for name in (MODEL, TOKENIZER) if name in arrays}
        return assembled(arrays, texts, path)


SAFETENSORS, NPZ = Safetensors(), Npz()


def descriptions(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the model's settings and its tokenizer as texts, by their keys."""
    return {MODEL: json.dumps(dataclasses.asdict(model_config(checkpoint))), TOKENIZER: checkpoint.tokenizer}


def assembled(tensors: dict[str, np.ndarray], texts: dict[str, str], path: Path) -> Checkpoint:
    """Make the checkpoint from the parts of a file.

    Args:
        tensors: The tensors by hiermpi's names.
        texts: The descriptions beside them.
        path: The path of the file, for messages.

    Raises:
        UserError: The parts are not a model of hiermpi.
    """
    if MODEL not in texts or TOKENIZER not in texts:
        raise UserError(f"{path} does not say what model it holds: name a file made by hiermpi export")
    try:
        config = ModelConfig(**json.loads(texts[MODEL]))
        tokenizer = tokenizer_from_json(texts[TOKENIZER])
    except (TypeError, ValueError, DamagedFile) as error:
        raise UserError(f"{path}: its description is not valid: {error}") from None
    if is_outside(config.family):  # the tensors are compared with those of the family where the user gives it
        return imported(config, tensors, tokenizer)
    return imported(config, fitted(config, tensors, str(path)), tokenizer)


def load_library() -> Any:
    """Return the ``safetensors`` library. Raises UserError where it is missing."""
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("this format needs the safetensors library: pip install 'hiermpi[export]'") from None
    return safetensors


def save_tensors(path: Path, tensors: Mapping[str, NDArray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Args:
        path: The file to make.
        tensors: The tensors by name.
        metadata: The texts beside them, by key.

    Raises:
        UserError: The safetensors library is missing.
        OSError: The file cannot be written.
    """
    library = load_library()
    path.write_bytes(library.numpy.save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, dict(metadata)))


def load_tensors(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises UserError."""
    library = load_library()
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a folder or a file with a model in safetensors or npz")
    try:
        with library.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001  (bfloat16 is a TypeError, damage a SafetensorError)
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as float32 or float16 tensors: {reason}") from None
