"""What loops.c was compiled to; every user has a numpy form that does the same."""

import ctypes
from functools import cache
from pathlib import Path

from hiermpi.kernels.memory import built_library


@cache
def compiled_loops() -> ctypes.CDLL | None:
    """The library; None where it was not built."""
    library = built_library(Path(__file__).parent, "_loops")
    if library is None:
        return None
    address, number = ctypes.c_void_p, ctypes.c_long
    library.balance.argtypes, library.balance.restype = [*[address] * 7, *[number] * 2], ctypes.c_int
    library.deal.argtypes = [*[address] * 8, *[number] * 3]
    library.count_groups.argtypes = [*[address] * 3, *[number] * 4]
    library.read_rows16.argtypes = library.read_rows32.argtypes = [*[address] * 7, *[number] * 3]
    library.pull_together.argtypes = [*[address] * 4, *[number] * 3, ctypes.c_float]
    library.pull_together.restype = ctypes.c_double
    for name in ("deal", "count_groups", "read_rows16", "read_rows32"):
        getattr(library, name).restype = None
    return library
