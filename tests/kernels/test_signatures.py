"""The tables of kernels/library.py against the C sources: functions, what they take and give, and constants."""

import re
from pathlib import Path

import pytest

from hiermpi import kernels
from hiermpi.kernels.library import CONSTANTS, LAYERS, SIGNATURES

FOLDER = Path(kernels.__file__).parent
OF_LIBRARY = {"_layers": ("levels.c",), "_loops": ("loops.c",), "_gates": ("gates.c",)}
OF_LAYERS = ("layers.h", "products.h")


def source(names):
    """Return the text of C files without comments, and with their function-like macros of functions written out."""
    text = "\n".join((FOLDER / name).read_text() for name in names).replace("\\\n", " ")
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    for macro, words, body in re.findall(r"#define (\w+)\(([\w, ]+)\) +([^\n]*\bvoid [^\n]*\{[^\n]*)", text):
        for given in re.findall(rf"^{macro}\(([\w, ]+)\)", text, flags=re.MULTILINE):
            written = body
            for word, value in zip(words.split(","), given.split(","), strict=True):
                written = re.sub(rf"\b{word.strip()}\b", value.strip(), written)
            text += f"\n{written}"
    return re.sub(r"\bNAME\((\w+)\)", r"\1", text)


def kind(declared):
    """Return the letter of library.TYPES for a C parameter or result."""
    if "*" in declared:
        return "s" if re.search(r"const char \*$", declared.strip()) else "p"
    letters = {"void": "v", "double": "d", "float": "f", "uint32_t": "u", "long": "l", "int": "i"}
    for word, letter in letters.items():
        if re.search(rf"\b{word}\b", declared):
            return letter
    raise AssertionError(declared)


def prototypes(text):
    """Return {function: its signatures, as in library.py}; a function may be defined for several systems."""
    found = {}
    pattern = r"^ *((?:const )?\w+ \*?)(\w+)\(([^(){}]*)\)\s*\{"
    for result, name, parameters in re.findall(pattern, text, flags=re.MULTILINE):
        words = [word for word in parameters.split(",") if word.strip() not in ("", "void")]
        letters = "".join(kind(word) if "*" not in word else "p" for word in words)
        found.setdefault(name, set()).add(f"{letters}->{kind(result)}")
    return found


def as_written(signature):
    """Return a signature of library.py without its spaces."""
    arguments, _, result = signature.partition("->")
    return f"{arguments.replace(' ', '')}->{result.strip() or 'v'}"


@pytest.mark.parametrize("library", SIGNATURES)
def test_the_functions_of_a_library(library):
    found = prototypes(source(OF_LIBRARY[library]))
    for name, signature in SIGNATURES[library].items():
        assert found.get(name) == {as_written(signature)}, name


def test_the_layers_of_every_level():
    found = prototypes(source(OF_LAYERS))
    for name, signature in LAYERS.items():
        assert found.get(name) == {as_written(signature)}, name


def test_no_function_is_missing_in_the_tables():
    static = re.compile(r"^ *(?:static|INLINE)\b.*", re.MULTILINE)
    for library, names in OF_LIBRARY.items():
        known = set(SIGNATURES[library]) | {"add_level"}
        assert set(prototypes(static.sub("", source(names)))) <= known, library
    assert set(prototypes(static.sub("", source(OF_LAYERS)))) <= set(LAYERS)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    text = source(sorted(path.name for path in [*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]))
    found = re.findall(rf"#define {name} (\d+)|\b{name} = (\d+)", text)
    assert found, name
    assert {int(one or other) for one, other in found} == {CONSTANTS[name]}
