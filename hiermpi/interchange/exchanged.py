"""What goes from one program to another: a model's shape, its tensors by our names in token order, its tokenizer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import Tokenizer
from hiermpi.errors import UserError
from hiermpi.model.contract import load_family, specs_of


@dataclass(frozen=True)
class Exchanged:
    """A model outside of a run."""

    config: ModelConfig
    tensors: dict[str, NDArray[np.float32]]
    tokenizer: Tokenizer


def fitted(config: ModelConfig, found: dict[str, NDArray], source: str) -> dict[str, NDArray[np.float32]]:
    """The tensors of the model's shape among ``found``, as float32. Raises UserError."""
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
        raise UserError(f"{source}: unknown tensors {', '.join(unknown[:4])}: this is not a GPT-2")
    return tensors
