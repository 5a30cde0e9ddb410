"""Imports go down, from floor to floor, and modules are few and full: the code is read, and held to it."""

import ast
import statistics
from pathlib import Path

import pytest

import hiermpi

ROOT = Path(hiermpi.__file__).parent
FLOORS = (
    ("errors", "progress", "signals"),
    ("config", "files", "kernels"),
    ("data", "hierarchy", "model"),
    ("communication", "optimizer", "storage"),
    ("interchange", "planning", "preparation", "reporting", "training"),
    ("benchmarks",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LIBRARIES = {
    "mpi4py": {"communication", "training", "benchmarks", "commands", "cli"},
    "h5py": {"storage", "commands"},
}
MOST_FLOORS, MOST_MODULES = 7, 70


def imports_of(path):
    """(module, is it for type checking only) of every import in a file, also inside functions."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in typing_only


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def part_of_module(module):
    """The part that an imported module is in; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "hiermpi" and len(parts) > 1 else None


def modules():
    """Every module but the faces of packages."""
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def arrows():
    """{part: the parts it imports}, for what runs and what is for type checking alike."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "__init__.py":  # the door for programs opens every room
            continue
        names = {part_of_module(module) for module, _ in imports_of(path)} - {None, part(path), "__version__"}
        found.setdefault(part(path), set()).update(names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    here = part(path)
    for module, typing_only in imports_of(path):
        other = part_of_module(module)
        if other not in (None, here, "__version__"):
            assert floor[other] < floor[here], f"{here} imports {module}"
        library = module.split(".")[0]
        if library in LIBRARIES and not typing_only:
            assert here in LIBRARIES[library], f"{here} imports {module}"


def test_every_part_has_its_floor():
    assert {part(path) for path in modules()} == {name for names in FLOORS for name in names}


def test_there_are_at_most_seven_floors():
    """A part stands above all that it imports: as high as the longest way down."""
    below = arrows()

    def floor(name):
        return 1 + max((floor(other) for other in below[name]), default=0)

    highest = max(below, key=floor)
    assert floor(highest) <= MOST_FLOORS, highest


def test_modules_are_few_and_full():
    lengths = [len(path.read_text().splitlines()) for path in modules()]
    assert len(lengths) <= MOST_MODULES
    assert 120 <= statistics.median(lengths) <= 250


def test_commands_import_nothing_heavy_at_the_top():
    """``--help`` must work where MPI must not be initialised."""
    for path in (ROOT / "commands").glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] not in ("mpi4py", "h5py", "numpy"), f"{path}: {name}"
