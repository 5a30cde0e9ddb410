"""Another program's model to a checkpoint at step 0, to generate from, to evaluate or to train on."""

from pathlib import Path

from hiermpi.config.schema import ModelConfig
from hiermpi.errors import UserError
from hiermpi.interchange.exchanged import Exchanged
from hiermpi.interchange.huggingface import is_huggingface, read_huggingface
from hiermpi.interchange.plain import read_npz, read_safetensors
from hiermpi.storage.checkpoint import Checkpoint

SHAPE = ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "symmetry_order", "tie_embeddings")


def read_model(source: Path) -> Exchanged:
    """The model in a folder (of transformers, or of hiermpi export) or file. Raises UserError."""
    if source.is_dir():
        if is_huggingface(source):
            return read_huggingface(source)
        for name in ("model.safetensors", "model.npz"):
            if (source / name).exists():
                return read_model(source / name)
        raise UserError(f"{source} holds no config.json, model.safetensors or model.npz: name a folder with a model")
    if not source.exists():
        raise UserError(f"{source} does not exist: name a folder or a file with a model")
    return read_npz(source) if source.suffix == ".npz" else read_safetensors(source)


def as_checkpoint(model: Exchanged) -> Checkpoint:
    """A checkpoint at step 0, of no dataset: :command:`train --resume` takes it for any."""
    config: ModelConfig = model.config
    return Checkpoint(
        step=0,
        cursor=0,
        seed=0,
        adam_count=0,
        skipped_steps=0,
        config={f"model.{name}": getattr(config, name) for name in SHAPE},
        tokenizer=model.tokenizer.to_json(),
        dataset_sha256="",
        parameters=model.tensors,
        state={},
        loss=float("nan"),
    )
