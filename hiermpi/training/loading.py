"""A model from a checkpoint, for the commands that use one."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hiermpi.errors import DamagedFile
from hiermpi.model.transformer import Transformer, transformer_specs
from hiermpi.storage.checkpoint import Checkpoint, load_checkpoint, model_config
from hiermpi.storage.run_folder import RunFolder


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint in file ``source``, or the newest whole one of the run in folder ``source``, without moments."""
    if source.is_dir():
        return RunFolder(source).newest_checkpoint()[1]
    return load_checkpoint(source, with_state=False)


def load_model(checkpoint: Checkpoint, symmetry_group: NDArray[np.uint8] | None = None) -> Transformer:
    """The model of ``checkpoint`` with its parameters. Raises DamagedFile where tensors do not fit the shape."""
    config = model_config(checkpoint)
    expected = {spec.name: spec.shape for spec in transformer_specs(config)}
    found = {name: tensor.shape for name, tensor in checkpoint.parameters.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise DamagedFile(f"the checkpoint's tensors do not fit its model settings: {', '.join(names[:4])}")
    model = Transformer(config, symmetry_group)
    model.load_token_order(checkpoint.parameters, model.parameters.vector)
    return model

