"""Checkpoint to another program's files."""

from pathlib import Path

from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UsageError
from hiermpi.files import told, whole_path
from hiermpi.interchange.exchanged import Exchanged, fitted
from hiermpi.interchange.huggingface import write_huggingface
from hiermpi.interchange.plain import write_npz, write_safetensors
from hiermpi.storage.checkpoint import Checkpoint, model_config

FORMATS = ("hf", "safetensors", "npz")
WRITERS = {"safetensors": write_safetensors, "npz": write_npz}


def export(checkpoint: Checkpoint, out: Path, kind: str, force: bool) -> Path:
    """Write the model of ``checkpoint`` in the format ``kind``; whole or not at all. Raises UserError.

    Args:
        checkpoint: moments not needed.
        out: a folder to make; for ``safetensors`` and ``npz`` also a file with that ending.
        kind: one of :data:`FORMATS`.
        force: replace what stands at ``out``.

    Returns:
        What was written.
    """
    config = model_config(checkpoint)
    tensors = fitted(config, dict(checkpoint.parameters), "the checkpoint")
    model = Exchanged(config, tensors, tokenizer_from_json(checkpoint.tokenizer))
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists: name another --out, or add --force to replace it")
    if force and out.is_dir() and not is_export(out):
        raise UsageError(f"{out} is a folder with other things than an exported model: name another --out")
    with told(out.parent, "write into"):
        out.parent.mkdir(parents=True, exist_ok=True)
    single = kind in WRITERS and out.suffix == f".{kind}"
    with told(out, "write"), whole_path(out) as temporary:
        if single:
            WRITERS[kind](temporary, model)
        else:
            temporary.mkdir()
            if kind == "hf":
                write_huggingface(temporary, model)
            else:
                WRITERS[kind](temporary / f"model.{kind}", model)
    return out


def is_export(folder: Path) -> bool:
    """Whether everything in ``folder`` is of an exported model."""
    return all(
        path.name in ("config.json", "tokenizer.json", "tokenizer_config.json") or path.stem == "model"
        for path in folder.iterdir()
    )


