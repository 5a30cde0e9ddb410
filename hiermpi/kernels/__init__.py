"""This package has all compiled code, and the numpy specification with which each piece of it must agree.

Code outside the package need not know what is compiled. The environment variable ``HIERMPI_KERNELS`` chooses the form
of the layers: ``auto`` (the default, which takes the best instruction set that the processor has), one of the
instruction sets, or ``numpy``. Where the library was not built, ``auto`` takes numpy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from hiermpi.errors import UsageError
from hiermpi.kernels.compiled import CompiledKernels
from hiermpi.kernels.layers import ReferenceKernels
from hiermpi.kernels.library import built_levels, load_library

Kernels = ReferenceKernels | CompiledKernels

VARIABLE = "HIERMPI_KERNELS"

_forced: list[str] = []


def available_levels() -> tuple[str, ...]:
    """Return the instruction sets that were built and that this processor has, from the least to the most preferred."""
    return tuple(level.name for level in built_levels() if level.usable)


def load_kernels(choice: str = "") -> Kernels:
    """Return the kernels called ``choice``; by default those of :func:`using_kernels` or of the environment.

    Raises:
        UsageError: The name is unknown, or this processor or installation does not have the kernels.
    """
    return _load(choice or (_forced[-1] if _forced else os.environ.get(VARIABLE, "auto")))


@contextmanager
def using_kernels(choice: str) -> Iterator[None]:
    """Let :func:`load_kernels` return the kernels called ``choice`` while the body runs."""
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _load(choice: str) -> Kernels:
    levels = built_levels()
    choices = ["auto", "numpy", *(level.name for level in levels or ())]
    library = load_library("_layers")
    if choice == "numpy" or (choice == "auto" and library is None):
        return ReferenceKernels()
    if library is None:
        raise UsageError(f"{VARIABLE} = {choice}: the kernels are not built: install again with a C compiler")
    if choice not in choices:
        raise UsageError(f'{VARIABLE} = "{choice}": expected one of {", ".join(choices)}')
    usable = [level for level in levels if level.usable]
    chosen = usable[-1] if choice == "auto" else next(level for level in levels if level.name == choice)
    if not chosen.usable:
        raise UsageError(f"{VARIABLE} = {choice}: this processor has {usable[-1].name} at the most")
    return CompiledKernels(library, chosen)
