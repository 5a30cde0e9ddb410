"""Every row arrives at the rank it is meant for, in the order of the batch, and nowhere else."""

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.scatter import SharedScatter, TreeScatter
from hiermpi.data.sequences import pack_records, unpack_records

pytestmark = pytest.mark.mpi


@pytest.fixture(params=["tree", "memory"])
def make(request):
    """A scatter for rows of some width; memory is for 30 rows."""
    if request.param == "tree":
        return TreeScatter
    return lambda comms, width: SharedScatter(comms, width, 30)


@pytest.mark.smoke
@pytest.mark.parametrize("batch", [0, 1, 5, 30, 100])
def test_rows_arrive(comm, make, batch):
    comms = Communicators(comm, 12)
    generator = np.random.default_rng(batch)
    leaf = generator.integers(0, comm.size, batch)
    tokens = generator.integers(-1, 99, (batch, 9)).astype(np.int32)
    ids = generator.integers(0, 2**40, batch)
    rows = pack_records(ids, tokens)
    scatter = make(comms, rows.shape[1])
    for _ in range(3):
        mine = scatter.scatter(*((rows, leaf) if comm.rank == 0 else (None, None)))
        collective_assert(comm, np.array_equal(mine, rows[leaf == comm.rank]))
    comms.free()


def test_all_rows_to_one_rank(comm, make):
    comms = Communicators(comm, 12)
    rows = np.arange(40, dtype=np.int32).reshape(8, 5)
    scatter = make(comms, 5)
    for target in {0, 1 % comm.size, comm.size - 1}:
        leaf = np.full(8, target)
        mine = scatter.scatter(*((rows, leaf) if comm.rank == 0 else (None, None)))
        collective_assert(comm, np.array_equal(mine, rows if comm.rank == target else rows[:0]))
    comms.free()


def test_rows_round_trip():
    ids = np.array([0, 1, 2**40, 2**62], np.int64)
    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    back_ids, back_tokens = unpack_records(pack_records(ids, tokens))
    assert np.array_equal(back_ids, ids)
    assert np.array_equal(back_tokens, tokens)
