"""cli -> commands -> training -> {communication, storage} -> pure: the imports say so, and this test reads them."""

import ast
from pathlib import Path

import pytest

import hiermpi

ROOT = Path(hiermpi.__file__).parent
FLOORS = (
    ("errors", "progress", "signals"),
    ("registry", "files"),
    ("config", "kernels"),
    ("data", "hierarchy", "model"),
    ("communication", "optimizer", "storage"),
    ("interchange", "planning", "preparation", "reporting", "training"),
    ("benchmarks",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
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


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = layer(path)
    for module, typing_only in imports_of(path):
        parts = module.split(".")
        if parts[0] == "hiermpi" and len(parts) > 1:
            assert parts[1] in ALLOWED[here], f"{here} imports {module}"
        if parts[0] in LIBRARIES and not typing_only:
            assert here in LIBRARIES[parts[0]], f"{here} imports {module}"


def test_every_part_has_its_layer():
    assert {layer(path) for path in ROOT.rglob("*.py")} == set(ALLOWED)


def test_commands_import_nothing_heavy_at_the_top():
    """``--help`` must work where MPI must not be initialised."""
    for path in (ROOT / "commands").glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] not in ("mpi4py", "h5py", "numpy"), f"{path}: {name}"
