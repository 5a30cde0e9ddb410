"""The libraries compiled at install, each of them optional, what they are called with, and the C library's memory."""

import ctypes
import importlib.machinery
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64
"""Bytes of a cache line: every tensor starts on one, whatever the element type."""


def built_library(folder: Path, name: str) -> ctypes.CDLL | None:
    """The library ``name`` in ``folder``; None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def give_back_memory() -> None:
    """Have the C library give the system what was freed; where it cannot, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def address_of(array: NDArray[Any]) -> int:
    """Address of an array's first byte. The caller keeps the array alive, and C-contiguous."""
    if DATA_FIELD:
        return ctypes.c_void_p.from_address(id(array) + DATA_FIELD).value or 0
    return array.__array_interface__["data"][0]


def plain_float32(*arrays: NDArray[Any]) -> bool:
    """Whether compiled loops can work on these arrays: float32, C-contiguous."""
    return all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)


def data_field() -> int:
    """Where an array object keeps its address, which reads six times faster there than by asking the array; else 0.

    In CPython the address of an object is its id, and behind the header that all objects have, numpy's
    PyArrayObject_fields begins with ``char *data``.
    """
    if sys.implementation.name != "cpython":
        return 0
    place = object.__basicsize__
    array = np.zeros(4, np.float32)
    for example in (array, array[1:], array[2:]):
        if ctypes.c_void_p.from_address(id(example) + place).value != example.__array_interface__["data"][0]:
            return 0
    return place


DATA_FIELD = data_field()


def aligned_empty(size: int, dtype: DTypeLike) -> NDArray:
    """An uninitialised 1-D array of ``size`` elements whose first byte is aligned to :data:`ALIGNMENT`."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype)


def aligned_zeros(size: int, dtype: DTypeLike) -> NDArray:
    """The same, zeroed."""
    array = aligned_empty(size, dtype)
    array[:] = 0
    return array


def lazy_zeros(size: int, dtype: DTypeLike) -> NDArray:
    """The same as :func:`aligned_zeros`, but the system gives memory only to the pages that are written."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype)


def round_up(nbytes: int) -> int:
    """``nbytes`` rounded up to cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def offsets_of(*nbytes: int) -> list[int]:
    """Offsets of pieces of so many bytes one after the other in whole cache lines, and where the last one ends."""
    return [0, *accumulate(map(round_up, nbytes))]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of an array that cannot be written."""
    view = array.view()
    view.flags.writeable = False
    return view
