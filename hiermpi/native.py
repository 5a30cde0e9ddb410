"""The libraries compiled at install; each is optional."""

import ctypes
import importlib.machinery
from pathlib import Path


def built_library(folder: Path, name: str) -> ctypes.CDLL | None:
    """The library ``name`` in ``folder``; None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    return None
