"""This module finds compiled libraries and the addresses of arrays, and allocates aligned memory."""

import ctypes
import importlib.machinery
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64
"""The bytes of a cache line: every tensor starts on one, whatever its element type."""


def built_library(folder: Path, name: str) -> ctypes.CDLL | None:
    """Return the library ``name`` in ``folder``; None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def give_back_memory() -> None:
    """Return freed memory from the C library to the system; where the library cannot do so, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first byte; the caller must keep the array alive, and C-contiguous."""
    if DATA_FIELD:
        return ctypes.c_void_p.from_address(id(array) + DATA_FIELD).value or 0
    return array.__array_interface__["data"][0]


def plain_float32(*arrays: NDArray[Any]) -> bool:
    """Tell whether compiled loops can use these arrays: all must be float32 and C-contiguous."""
    return all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)


def data_field() -> int:
    """Return the byte offset in an array object at which numpy keeps the data's address; 0 where it is not known.

    Reading the address there is six times faster than asking the array. In CPython the address of an object is its id,
    and behind the header that all objects have, numpy's PyArrayObject_fields begins with ``char *data``.
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
    """Return an uninitialised 1-D array of ``size`` elements whose first byte is aligned to :data:`ALIGNMENT`."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype)


def aligned_zeros(size: int, dtype: DTypeLike) -> NDArray:
    """Return a zeroed 1-D array of ``size`` elements whose first byte is aligned to :data:`ALIGNMENT`."""
    array = aligned_empty(size, dtype)
    array[:] = 0
    return array


def lazy_zeros(size: int, dtype: DTypeLike) -> NDArray:
    """Return an array as :func:`aligned_zeros` does, for which the system provides only the pages that are written."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype)


def round_up(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to whole cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def offsets_of(*nbytes: int) -> list[int]:
    """Return the byte offsets of pieces of so many bytes, each in whole cache lines, and the end of the last one."""
    return [0, *accumulate(map(round_up, nbytes))]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of an array that cannot be written."""
    view = array.view()
    view.flags.writeable = False
    return view
