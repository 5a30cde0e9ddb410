"""The losses of a fixed run are a contract: a refactor must reproduce them.

Make the file again, after a change that is meant to change them: ``python tests/test_golden.py``.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hiermpi.kernels import available_levels, load_kernels

sys.path.insert(0, str(Path(__file__).parent))
os.environ["OPENBLAS_NUM_THREADS"] = "1"

AVAILABLE = available_levels()
GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.txt"


def golden_run(folder):
    from mpi4py import MPI

    from runs import TINY, losses, make_dataset, train_on

    data = make_dataset(folder)
    assert train_on(MPI.COMM_SELF, data, folder / "run", *TINY, "--model.dropout", "0.1") == 0
    return losses(folder / "run")


@pytest.mark.parametrize("kernels", ["numpy", *AVAILABLE])
def test_golden_losses(tmp_path, monkeypatch, kernels):
    """On a processor without AVX-512 or AVX2, and without a compiler, too."""
    monkeypatch.setenv("HIERMPI_KERNELS", kernels)
    assert load_kernels().name == kernels
    assert np.allclose(golden_run(tmp_path), np.loadtxt(GOLDEN), rtol=1e-5, atol=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        np.savetxt(GOLDEN, golden_run(Path(made)), fmt="%.9f")
