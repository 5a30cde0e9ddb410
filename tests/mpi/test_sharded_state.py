"""State that lies with its owners: whole at the root, and back again, whoever owns what."""

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.scatter import deal_out_owned, gather_owned
from hiermpi.hierarchy.ownership import Ownership

pytestmark = pytest.mark.mpi
SIZE = 1003


def ownership_by(comms, rule):
    """Uneven blocks; ``rule`` says which owner each has, of how many."""
    ranks = [0, *comms.topology.control_ranks]
    bounds = np.array([*range(0, SIZE, 50), SIZE])
    owners = np.array([rule(block, len(ranks)) for block in range(len(bounds) - 1)])
    return Ownership(bounds, owners, np.full(len(owners), -1), ranks)


RULES = {
    "the root owns all": lambda block, n: 0,  # noqa: ARG005
    "all own some": lambda block, n: block % n,
    "the root owns nothing": lambda block, n: block % (n - 1) + 1 if n > 1 else 0,
    "the last one owns all": lambda block, n: n - 1,  # noqa: ARG005
}


def owned_mask(ownership, number):
    mask = np.zeros(SIZE, bool)
    for start, stop, _ in ownership.spans_of(number):
        mask[start:stop] = True
    return mask


@pytest.mark.smoke
@pytest.mark.parametrize("names", [("m", "v"), ("momentum",), (), ("v", "a", "m")])
@pytest.mark.parametrize("rule", RULES)
def test_parts_come_together_and_go_back(comm, rule, names, monkeypatch):
    monkeypatch.setattr("hiermpi.communication.reduction.CHUNK_BYTES", 64)
    comms = Communicators(comm, 12)
    ownership = ownership_by(comms, RULES[rule])
    number = ownership.number(comms.rank)
    values = {name: np.arange(SIZE, dtype=np.float32) * (index + 1) for index, name in enumerate(names)}
    state, mask = None, None
    if number is not None:
        mask = owned_mask(ownership, number)
        state = {name: np.where(mask, vector, np.float32(-1)) for name, vector in values.items()}
    whole = gather_owned(comms, ownership, state)
    collective_assert(comm, (whole is not None) == (comm.rank == 0))
    good = whole is None or (list(whole) == list(names) and all(np.array_equal(whole[n], values[n]) for n in names))
    collective_assert(comm, good, whole)
    # Gathering changes nothing of the ranks' own.
    collective_assert(comm, state is None or all((vector[~mask] == -1).all() for vector in state.values()))

    back = None if state is None else {name: np.full(SIZE, -2, np.float32) for name in names}
    deal_out_owned(comms, ownership, whole, back)
    good = True
    if back is not None:
        good = all(np.array_equal(back[name], np.where(mask, values[name], np.float32(-2))) for name in names)
    collective_assert(comm, good, back)
    comms.free()


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
def test_state_keeps_its_type_and_every_bit(comm, dtype, monkeypatch):
    """NaN, infinities, negative zero and the greatest integers travel as they are, in one piece or in many."""
    if dtype is np.int64:
        values = np.resize(np.array([-(2**63), 2**63 - 1, 0, 2**53 + 1], dtype), SIZE)
    else:
        values = np.resize(np.array([np.nan, np.inf, -np.inf, -0.0, np.finfo(dtype).tiny], dtype), SIZE)
    comms = Communicators(comm, 12)
    ownership = ownership_by(comms, RULES["the root owns nothing"])
    number = ownership.number(comms.rank)
    good = []
    for chunk in (24, 1 << 20):
        monkeypatch.setattr("hiermpi.communication.reduction.CHUNK_BYTES", chunk)
        mine = None if number is None else np.where(owned_mask(ownership, number), values, dtype(1))
        whole = gather_owned(comms, ownership, None if mine is None else {"s": mine})
        if whole is not None:
            good.append(whole["s"].dtype == dtype and whole["s"].tobytes() == values.tobytes())
        back = None if number is None else {"s": np.full(SIZE, 7, dtype)}
        deal_out_owned(comms, ownership, whole, back)
        if back is not None:
            wanted = np.where(owned_mask(ownership, number), values, dtype(7))
            good.append(back["s"].tobytes() == wanted.tobytes())
    collective_assert(comm, all(good), good)
    comms.free()


def test_what_the_root_owns_alone_is_not_copied(comm):
    comms = Communicators(comm, 12)
    ownership = ownership_by(comms, RULES["the root owns all"])
    state = {"m": np.ones(SIZE, np.float32)} if comm.rank == 0 else None
    whole = gather_owned(comms, ownership, state)
    collective_assert(comm, whole is None or whole["m"] is state["m"])
    comms.free()
