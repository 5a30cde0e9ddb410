"""The layers of the model, in numpy (the specification) and compiled (the same, fast).

``HIERMPI_KERNELS`` chooses: ``auto`` (default: the best the processor has), ``avx512``, ``avx2``, ``plain`` or
``numpy``. Where the library was not built, ``auto`` is numpy.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from hiermpi.errors import UsageError
from hiermpi.kernels.compiled import CompiledKernels
from hiermpi.kernels.layers import ReferenceKernels
from hiermpi.kernels.memory import built_library

Kernels = ReferenceKernels | CompiledKernels

LEVELS = ("plain", "avx2", "avx512")
CHOICES = ("auto", "numpy", *LEVELS)
VARIABLE = "HIERMPI_KERNELS"


@cache
def load_kernels(choice: str = "") -> Kernels:
    """The kernels called ``choice``, by default the environment's.

    Raises:
        UsageError: an unknown name, or kernels that this machine or installation does not have.
    """
    choice = choice or os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise UsageError(f'{VARIABLE} = "{choice}": expected one of {", ".join(CHOICES)}')
    library = None if choice == "numpy" else find_library()
    if library is None:
        if choice in LEVELS:
            raise UsageError(f"{VARIABLE} = {choice}: the kernels are not built: install again with a C compiler")
        return ReferenceKernels()
    best = LEVELS[library.supported_level()]
    level = best if choice == "auto" else choice
    if LEVELS.index(level) > LEVELS.index(best):
        raise UsageError(f"{VARIABLE} = {choice}: this processor has {best} at the most")
    return CompiledKernels(library, level)


@cache
def find_library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built."""
    return built_library(Path(__file__).parent, "_kernels")
