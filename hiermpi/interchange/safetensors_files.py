"""Tensors in a safetensors file (extra ``export``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.errors import UserError


def load_library() -> Any:
    """The ``safetensors`` library. Raises UserError where it is missing."""
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("this format needs the safetensors library: pip install 'hiermpi[export]'") from None
    return safetensors


def save_tensors(path: Path, tensors: Mapping[str, NDArray], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``. Raises UserError, OSError."""
    library = load_library()
    path.write_bytes(library.numpy.save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, dict(metadata)))


def load_tensors(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    """The tensors and the metadata of a file. Raises UserError."""
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
