"""A test of compiled loops runs on the numpy form too."""

from types import ModuleType
from typing import Any

import pytest


def both_forms(module: ModuleType) -> Any:
    """An automatic fixture: ``module`` uses its numpy form, then loops.c where this installation has it."""
    built = module.compiled_loops()

    @pytest.fixture(autouse=True, params=["numpy", "compiled"])
    def form(request, monkeypatch):
        if request.param == "compiled" and built is None:
            pytest.skip("loops.c was not built")
        monkeypatch.setattr(module, "compiled_loops", lambda: built if request.param == "compiled" else None)
        return request.param

    return form
