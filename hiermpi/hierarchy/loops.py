"""What loops.c was compiled to; every user has a numpy form that does the same."""

import ctypes
from functools import cache
from pathlib import Path

from hiermpi.native import built_library


@cache
def compiled_loops() -> ctypes.CDLL | None:
    """The library; None where it was not built."""
    library = built_library(Path(__file__).parent, "_loops")
    if library is None:
        return None
    library.balance.argtypes = [*[ctypes.c_void_p] * 6, ctypes.c_long, ctypes.c_long]
    library.count_groups.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 4]
    library.balance.restype = library.count_groups.restype = None
    return library
