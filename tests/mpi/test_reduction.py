"""Sums and broadcasts, with expectations closed in rank and size; flat is the reference that tree must equal."""

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication import reduction
from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import Vectors, allreduce_small, chunks
from hiermpi.hierarchy.ownership import Ownership, owned_by_root

pytestmark = pytest.mark.mpi


@pytest.fixture(params=["tree", "shared", "flat"])
def kind(request):
    return request.param


def gradients(how, values):
    """This rank's gradient vector, filled."""
    vector = how.gradient_vector()
    vector[:] = values
    return vector


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 5, 1000])
def test_sum_of_ranks(comm, kind, n):
    comms = Communicators(comm, 12)
    how = make_reduction(kind, comms, owned_by_root(n), Vectors()).reduction
    size = comm.size
    vector = how.gradient_vector()
    small = np.empty(4)
    for repeat in range(3):  # lazy initialisation and reuse hide bugs
        vector[:] = comm.rank + 1 + repeat
        small[:] = comm.rank + 1 + repeat
        total = how.reduce(small, vector)
        expected = size * (size + 1) / 2 + size * repeat
        collective_assert(comm, comm.rank or (total == expected).all(), f"{total[:3]} is not {expected}")
        collective_assert(comm, comm.rank or (small == expected).all(), f"{small} is not {expected}")
    how.free()
    comms.free()


@pytest.mark.parametrize("order", [1, 2, 3, 12])
def test_sum_in_many_chunks(comm, kind, order, monkeypatch):
    monkeypatch.setattr(reduction, "CHUNK_BYTES", 64)
    comms = Communicators(comm, order)
    how = make_reduction(kind, comms, owned_by_root(1003), Vectors()).reduction
    vector = gradients(how, np.arange(1003) * (comm.rank + 1))
    total = how.reduce(np.zeros(4), vector)
    expected = np.arange(1003, dtype=np.float32) * (comm.size * (comm.size + 1) / 2)
    collective_assert(comm, comm.rank or np.array_equal(total, expected))
    how.free()
    comms.free()


def test_every_form_equals_flat_to_rounding(comm):
    comms = Communicators(comm, 12)
    mine = np.random.default_rng(comm.rank).normal(size=5000).astype(np.float32)
    sums = {}
    for kind in ("flat", "tree", "shared"):
        how = make_reduction(kind, comms, owned_by_root(5000), Vectors()).reduction
        vector = gradients(how, mine)
        sums[kind] = how.reduce(np.zeros(4), vector).copy()
        how.free()
    for kind in ("tree", "shared"):
        collective_assert(comm, comm.rank or np.allclose(sums[kind], sums["flat"], rtol=0, atol=1e-5), kind)
    comms.free()


def test_same_bits_every_time(comm, kind):
    comms = Communicators(comm, 12)
    how = make_reduction(kind, comms, owned_by_root(300_000), Vectors()).reduction
    mine = np.random.default_rng(comm.rank).normal(size=300_000).astype(np.float32)
    vector, first = how.gradient_vector(), None
    for _ in range(4):
        vector[:] = mine
        total = how.reduce(np.zeros(4), vector)
        first = total.copy() if first is None else first
        collective_assert(comm, comm.rank or np.array_equal(first, total))
    how.free()
    comms.free()


@pytest.mark.smoke
def test_broadcast_reaches_every_rank(comm, kind):
    comms = Communicators(comm, 12)
    how = make_reduction(kind, comms, owned_by_root(1000), Vectors()).reduction
    parameters = how.parameter_slots()[0]
    for value in (7.5, 8.5):
        if comm.rank == 0:
            parameters[:] = value
        small = np.array([value, 1.0] if comm.rank == 0 else [0.0, 0.0])
        how.broadcast(small, parameters)
        collective_assert(comm, (parameters == value).all(), parameters[:3])
        collective_assert(comm, small.tolist() == [value, 1.0], small)
        how.broadcast(small, parameters)  # nobody may run ahead and write while others still compare
    how.free()
    comms.free()


@pytest.mark.parametrize("owner", [0, 1])
def test_those_who_decide_have_the_sums_and_are_heard(comm, kind, owner):
    """The root need not decide where it owns nothing; every owner always does."""
    comms = Communicators(comm, 12)
    ranks = [0, *comms.topology.control_ranks]
    number = min(owner, len(ranks) - 1)
    blocks = np.arange(0, 1001, 100)
    ownership = Ownership(blocks, np.full(10, number), np.full(10, -1), ranks)
    how = make_reduction(kind, comms, ownership, Vectors()).reduction
    alone = kind == "shared" and comms.topology.n_nodes == 1
    owns = comm.rank == ranks[number]
    collective_assert(comm, how.decides == (owns if alone else ownership.number(comm.rank) is not None))
    for turn in range(1, 20):
        sums = np.array([1.0, turn])
        vector = gradients(how, comm.rank + turn)
        total = how.reduce(sums, vector)
        expected = comm.size * (comm.size - 1) / 2 + comm.size * turn
        good = not how.decides or sums.tolist() == [comm.size, comm.size * turn]
        good = good and (not owns or bool((total == expected).all()))
        found = np.zeros((1, 10)) if how.decides else None
        if found is not None and owns:
            found[:] = turn
        if ownership.shared_out:
            how.exchange(found)
        good = good and (found is None or bool((found == turn).all()))
        verdict = np.array([1.0, turn] if how.decides else [0.0, 0.0])
        how.broadcast(verdict, how.parameter_slots()[0])
        collective_assert(comm, good and verdict.tolist() == [1.0, turn], (good, verdict))
    how.free()
    comms.free()


@pytest.mark.parametrize("names", [("m", "v"), ("momentum",), ()])
@pytest.mark.parametrize("slots", [1, 2])
def test_state_is_kept_by_name(comm, kind, slots, names):
    comms = Communicators(comm, 12)
    ranks = [0, *comms.topology.control_ranks]
    blocks = np.arange(0, 1001, 100)
    ownership = Ownership(blocks, np.arange(10) % len(ranks), np.full(10, -1), ranks)
    how = make_reduction(kind, comms, ownership, Vectors(slots=slots, state=names)).reduction
    state = how.state_slots()
    good = len(state) == slots == len(how.parameter_slots()) and all(tuple(slot) == names for slot in state)
    vectors = [slot[name] for slot in state for name in names]
    good = good and all(vector.shape == (1000,) and vector.dtype == np.float32 for vector in vectors)
    collective_assert(comm, good and not any(vector.any() for vector in vectors), state)
    comms.waiter.wait(comm.Ibarrier())
    number = ownership.number(comm.rank)
    for start, stop, owner in [] if number is None else ownership.spans_of(number):
        for index, vector in enumerate(vectors):
            vector[start:stop] = 10 * owner + index
    comms.waiter.wait(comm.Ibarrier())
    outlives = how.shares_memory and slots == 2  # then every rank of the node sees what its owners wrote
    seen = ownership.ranks if outlives else [comm.rank]
    nodes = comms.topology.nodes
    for start, stop, owner in ownership.spans:
        rank = ownership.ranks[owner]
        if rank in seen and nodes[rank] == nodes[comm.rank]:
            good = good and all((v[start:stop] == 10 * owner + index).all() for index, v in enumerate(vectors))
    collective_assert(comm, good, state)
    how.free()
    comms.free()


def test_without_shared_memory_the_tree_takes_over(comm, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    comms = Communicators(comm, 12)
    chosen = make_reduction("shared", comms, owned_by_root(10), Vectors())
    assert chosen.name == chosen.reduction.name == "tree"
    assert comm.rank or "shared memory on this node" in caplog.text
    assert comm.rank or "hierarchy.reduction = tree is used instead" in caplog.text
    assert not comm.rank or not caplog.text
    chosen.reduction.free()
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
