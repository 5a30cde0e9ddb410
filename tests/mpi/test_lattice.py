"""The lattice's coupling: the same model on any ranks, logged beside the loss, and it pulls neighbours together."""

import numpy as np
import pytest
from mpi4py import MPI

from hiermpi.storage.run_folder import RunFolder
from runs import TINY, last_checkpoint, make_dataset, train_on


@pytest.mark.mpi
def test_coupled_runs_agree_with_one_rank(world, shared_folder):
    options = (*TINY, "--train.steps", "8")
    data = shared_folder / "data.h5"
    if world.rank == 0:
        make_dataset(shared_folder)
        assert train_on(MPI.COMM_SELF, data, shared_folder / "free", *options) == 0
        assert train_on(MPI.COMM_SELF, data, shared_folder / "alone", *options, "--lattice.coupling", "0.01") == 0
    assert train_on(world, data, shared_folder / "many", *options, "--lattice.coupling", "0.01") == 0
    if world.rank == 0:
        rows = {name: RunFolder(shared_folder / name).read_metrics() for name in ("free", "alone", "many")}
        assert "lattice_loss" not in rows["free"][0]
        for one, many in zip(rows["alone"], rows["many"], strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert many["lattice_loss"] == pytest.approx(one["lattice_loss"], rel=1e-4)
        first, last = rows["alone"][0], rows["alone"][-1]
        assert first["loss"] == rows["free"][0]["loss"]  # it is not in the loss
        assert last["lattice_loss"] < first["lattice_loss"]
        alone, many, free = (last_checkpoint(shared_folder / name).parameters for name in ("alone", "many", "free"))
        assert max(float(np.abs(alone[name] - many[name]).max()) for name in alone) < 1e-4
        assert spread(alone["wte.weight"]) < spread(free["wte.weight"])


def spread(table):
    """Squared distance of the tokens of a shell from its mean."""
    shells = table[: len(table) // 12 * 12].reshape(-1, 12, table.shape[1])
    return float(np.square(shells - shells.mean(axis=1, keepdims=True)).sum())
