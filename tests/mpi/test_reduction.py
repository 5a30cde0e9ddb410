"""Sums and broadcasts, with expectations closed in rank and size; flat is the reference that tree must equal."""

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication import reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import allreduce_small, chunks, make_reduction

pytestmark = pytest.mark.mpi


@pytest.fixture(params=["tree", "flat"])
def kind(request):
    return request.param


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 5, 1000])
def test_sum_of_ranks(comm, kind, n, dtype):
    comms = Communicators(comm, 12)
    how = make_reduction(kind, comms)
    size = comm.size
    for repeat in range(2):  # lazy initialisation hides bugs
        vector = np.full(n, comm.rank + 1 + repeat, dtype)
        how.reduce(vector)
        expected = size * (size + 1) / 2 + size * repeat
        collective_assert(comm, comm.rank or (vector == expected).all(), f"{vector[:3]} is not {expected}")
    comms.free()


@pytest.mark.parametrize("order", [1, 2, 3, 12])
def test_sum_in_many_chunks(comm, kind, order, monkeypatch):
    monkeypatch.setattr(reduction, "CHUNK_BYTES", 64)
    comms = Communicators(comm, order)
    how = make_reduction(kind, comms)
    vector = np.arange(1003, dtype=np.float32) * (comm.rank + 1)
    how.reduce(vector)
    expected = np.arange(1003, dtype=np.float32) * (comm.size * (comm.size + 1) / 2)
    collective_assert(comm, comm.rank or np.array_equal(vector, expected))
    how.broadcast(vector)
    collective_assert(comm, np.array_equal(vector, expected))
    comms.free()


def test_tree_equals_flat_to_rounding(comm):
    comms = Communicators(comm, 12)
    mine = np.random.default_rng(comm.rank).normal(size=5000).astype(np.float32)
    sums = []
    for kind in ("tree", "flat"):
        vector = mine.copy()
        make_reduction(kind, comms).reduce(vector)
        sums.append(vector)
    collective_assert(comm, comm.rank or np.allclose(sums[0], sums[1], rtol=0, atol=1e-5))
    comms.free()


def test_same_bits_every_time(comm, kind):
    comms = Communicators(comm, 12)
    how = make_reduction(kind, comms)
    mine = np.random.default_rng(comm.rank).normal(size=300_000).astype(np.float32)
    first = mine.copy()
    how.reduce(first)
    for _ in range(3):
        again = mine.copy()
        how.reduce(again)
        collective_assert(comm, comm.rank or np.array_equal(first, again))
    comms.free()


@pytest.mark.smoke
def test_broadcast_reaches_every_rank(comm, kind):
    comms = Communicators(comm, 12)
    vector = np.full(1000, 7.5 if comm.rank == 0 else -1, np.float32)
    make_reduction(kind, comms).broadcast(vector)
    collective_assert(comm, (vector == 7.5).all())
    comms.free()


def test_allreduce_small(comm):
    comms = Communicators(comm, 12)
    values = np.array([1.0, comm.rank])
    allreduce_small(comms, values)
    collective_assert(comm, values.tolist() == [comm.size, comm.size * (comm.size - 1) / 2])
    comms.free()


def test_chunks_cover_the_vector():
    vector = np.zeros(reduction.CHUNK_BYTES // 4 * 2 + 3, np.float32)
    pieces = chunks(vector)
    assert [len(piece) for piece in pieces] == [reduction.CHUNK_BYTES // 4, reduction.CHUNK_BYTES // 4, 3]
    assert all(piece.base is vector for piece in pieces)
