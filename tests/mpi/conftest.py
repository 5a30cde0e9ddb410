"""Fixtures of the tests that run on every rank."""

import shutil
import tempfile
from pathlib import Path

import pytest
from mpi4py import MPI

from hiermpi.communication.agreement import broadcast_object
from hiermpi.communication.waiting import Waiter


@pytest.fixture(params=["world", "self"])
def comm(request):
    """A duplicate of COMM_WORLD and of COMM_SELF, freed afterwards."""
    duplicate = (MPI.COMM_WORLD if request.param == "world" else MPI.COMM_SELF).Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture
def world():
    """A duplicate of COMM_WORLD, freed afterwards."""
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture
def shared_folder(world):
    """A new folder that all ranks see under the same path; removed when all are done with it."""
    made = tempfile.mkdtemp(prefix="hiermpi-test-") if world.rank == 0 else None
    folder = Path(broadcast_object(world, made, Waiter()))
    yield folder
    Waiter().wait(world.Ibarrier())
    if world.rank == 0:
        shutil.rmtree(folder)
