"""One file with the tensors by our names, the model's shape and its tokenizer: safetensors, or numpy's npz."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np

from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import DamagedFile, UserError
from hiermpi.interchange.exchanged import Exchanged, fitted
from hiermpi.interchange.safetensors_files import load_tensors, save_tensors

MODEL, TOKENIZER = "hiermpi.model", "hiermpi.tokenizer"
"""Names of the two descriptions beside the tensors."""


def write_safetensors(path: Path, model: Exchanged) -> None:
    """Write the model to ``path``."""
    save_tensors(path, model.tensors, descriptions(model))


def read_safetensors(path: Path) -> Exchanged:
    """The model at ``path``. Raises UserError."""
    tensors, metadata = load_tensors(path)
    return assembled(tensors, metadata, path)


def write_npz(path: Path, model: Exchanged) -> None:
    """Write the model to ``path``."""
    texts = {name: np.array(text) for name, text in descriptions(model).items()}
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **model.tensors, **texts)


def read_npz(path: Path) -> Exchanged:
    """The model at ``path``. Raises UserError."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves it open on errors
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as npz: {reason}") from None
    texts = {name: str(arrays.pop(name)) for name in (MODEL, TOKENIZER) if name in arrays}
    return assembled(arrays, texts, path)


def descriptions(model: Exchanged) -> dict[str, str]:
    """What stands beside the tensors."""
    return {MODEL: json.dumps(dataclasses.asdict(model.config)), TOKENIZER: model.tokenizer.to_json()}


def assembled(tensors: dict[str, np.ndarray], texts: dict[str, str], path: Path) -> Exchanged:
    """The model of these parts. Raises UserError."""
    if MODEL not in texts or TOKENIZER not in texts:
        raise UserError(f"{path} does not say what model it holds: name a file made by hiermpi export")
    try:
        config = ModelConfig(**json.loads(texts[MODEL]))
        tokenizer = tokenizer_from_json(texts[TOKENIZER])
    except (TypeError, ValueError, DamagedFile) as error:
        raise UserError(f"{path}: its description is not valid: {error}") from None
    return Exchanged(config, fitted(config, tensors, str(path)), tokenizer)
