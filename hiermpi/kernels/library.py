"""This module loads the compiled libraries, and knows their signatures and the instruction sets that were built.

Each library is optional: where there was no compiler, the numpy specification is used. The tables below mirror
the C sources; a test reads both and compares them.
"""

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent

TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "i": ctypes.c_int,
    "l": ctypes.c_long,
    "u": ctypes.c_uint32,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "v": None,
}
"""The C types by letter: p is an address, s a text, i int, l long, u uint32_t, f float, d double, and v void."""

LAYERS = {
    "product": "pppp lll lll ll l",
    "product_gelu": "pppppp lll",
    "product_slope": "pppppp lll",
    "embed_forward": "pppp lll",
    "embed_backward": "pppp lll",
    "norm_forward": "pppppp ll",
    "residual_norm_forward": "ppppppppp ll",
    "norm_backward": "ppppppppp lll",
    "column_sums": "pp ll",
    "gelu_forward": "ppp ll",
    "gelu_backward": "ppp ll",
    "dropout": "pp ll uf",
    "attention_forward": "ppppp llll puf",
    "attention_backward": "ppppppp llll puf",
    "cross_entropy": "pp lll -> d",
    "adamw": "ppppppp l fffffff",
    "block_sums": "ppp l",
    "sum_buffers": "pp llll",
    "sum_integers": "pp llll",
    "add_fixed": "pp l ff l -> l",
    "from_fixed": "pp l d",
    "multiply_adds": "l -> d",
}
"""The signature of each kernel in layers.h and products.h; every level has one, called ``NAME_LEVEL``."""

SIGNATURES = {
    "_layers": {
        "level_name": "l -> s",
        "level_usable": "l -> l",
        "level_floats": "l -> l",
        "level_own_products": "l -> l",
    },
    "_loops": {
        "balance": "ppppppp ll -> i",
        "deal": "pppppppp lll",
        "count_groups": "ppp llll",
        "read_rows16": "ppppppp lll",
        "read_rows32": "ppppppp lll",
        "pull_together": "pppp lll f -> d",
    },
    "_gates": {
        "usable": " -> i",
        "arrive": "p",
        "passed": "pp -> i",
        "ask_slot": "pp u",
        "take_slot": "ppp uu -> l",
        "give_slot_back": "p uuu",
        "deal_rows": "ppppp lll",
        "offer": "pppp l -> i",
        "collect": "pppp lll -> i",
        "take": "pppp l -> i",
        "tell": "pppp ll -> i",
    },
}
"""The signature of each function, by library."""

CONSTANTS = {"PACKED_STRIDE": 512, "PVECS": 3, "TABLE_BINS": 256, "LINE": 64, "ID_COLUMNS": 2}
"""The numbers on which Python and C must agree, by their names in C."""


class Level(NamedTuple):
    """An instruction set that the library was built with."""

    name: str
    usable: bool
    """Whether this processor has the instruction set."""
    floats: int
    """The number of floats in a register."""
    own_products: bool
    """Whether its products are faster than a tuned BLAS; see ``hiermpi bench kernels``."""


@cache
def load_library(name: str) -> ctypes.CDLL | None:
    """Load a library and declare the signatures of its functions; return None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = FOLDER / f"{name}{suffix}"
        if path.exists():
            library = ctypes.CDLL(str(path))
            for function, signature in SIGNATURES[name].items():
                declare(getattr(library, function), signature)
            return library
    return None


def declare(function: Any, signature: str) -> Any:
    """Set the types of a function by a signature such as ``"pp l -> d"``; return the function."""
    arguments, _, result = signature.partition("->")
    function.argtypes = [TYPES[letter] for letter in arguments.replace(" ", "")]
    function.restype = TYPES[result.strip() or "v"]
    return function


@cache
def built_levels() -> tuple[Level, ...]:
    """Return the instruction sets in the library, from the least to the most preferred; none where it is missing."""
    library = load_library("_layers")
    found: list[Level] = []
    while library is not None and (name := library.level_name(len(found))):
        index = len(found)
        facts = (library.level_usable(index), library.level_floats(index), library.level_own_products(index))
        found.append(Level(name.decode(), bool(facts[0]), facts[1], bool(facts[2])))
    return tuple(found)
