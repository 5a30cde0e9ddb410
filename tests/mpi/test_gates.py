"""Gates and mailboxes: nobody passes too early, numbers are those of the round, compiled and polling."""

import time

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.node import NodeMemory
from hiermpi.communication.reduction import Vectors
from hiermpi.communication.scatter import SharedScatter
from hiermpi.hierarchy.ownership import owned_by_root
from hiermpi.kernels import gates
from hiermpi.kernels.gates import gate_bytes, mailbox_bytes, make_gate, make_mailboxes
from hiermpi.kernels.memory import offsets_of

pytestmark = pytest.mark.mpi
ROUNDS = 30


@pytest.fixture(autouse=True, params=["compiled", "polling"])
def form(request, monkeypatch):
    """Both forms, where this installation has the compiled one."""
    if request.param == "polling":
        monkeypatch.setattr(gates, "gates_library", lambda: None)
    elif not gates.can_sleep():
        pytest.skip("gates.c was not built")


@pytest.fixture
def comms(comm):
    made = Communicators(comm, 12)
    yield made
    made.free()


def test_nobody_passes_before_the_members_arrive(comms):
    node = comms.node
    members = sorted({0, node.size - 1, node.size // 2})
    *offsets, end = offsets_of(gate_bytes(len(members)), gate_bytes(node.size), 8 * node.size)
    memory = NodeMemory(node, end, comms.waiter)
    some = make_gate(memory, offsets[0], members, comms.waiter)
    everyone = make_gate(memory, offsets[1], range(node.size), comms.waiter)
    written = memory.array(offsets[2], (node.size,), np.int64)
    seen = []
    for turn in range(1, ROUNDS):
        if node.rank == members[turn % len(members)]:
            time.sleep(5e-4)
        if node.rank in members:
            written[node.rank] = turn
        some.arrive()
        some.wait()
        seen.append(all(written[member] == turn for member in members))
        everyone.meet()
    collective_assert(comms.world, all(seen), seen)


def test_a_wait_longer_than_the_kernel_sleeps(comms, monkeypatch):
    monkeypatch.setattr("hiermpi.kernels.gates.LONGEST_KERNEL_SLEEP_NS", 1_000_000)
    node = comms.node
    memory = NodeMemory(node, gate_bytes(1), comms.waiter)
    gate = make_gate(memory, 0, [0], comms.waiter)
    waited = comms.waiter.seconds
    if node.rank == 0:
        time.sleep(0.05)
    gate.meet()
    collective_assert(comms.world, node.rank == 0 or comms.waiter.seconds - waited > 0.02)


def test_the_count_wraps_around(comms):
    node = comms.node
    memory = NodeMemory(node, gate_bytes(node.size), comms.waiter)
    gate = make_gate(memory, 0, range(node.size), comms.waiter)
    # As if there had been nearly 2^32 arrivals: a round less than what makes the count wrap.
    before = 2**32 // node.size - 2
    if memory.sleeps:
        gate.state.round = before
        if node.rank == 0:
            memory.array(0, (1,), np.uint32)[0] = before * node.size & 0xFFFFFFFF
    else:
        gate.round = before
        if node.rank == 0:
            gate.arrivals[:] = before
    comms.waiter.wait(node.Ibarrier())
    for _ in range(6):
        gate.meet()
    collective_assert(comms.world, not memory.sleeps or int(memory.array(0, (1,), np.uint32)[0]) < 100 * node.size)


def test_mailboxes_hold_the_numbers_of_the_round(comms):
    node = comms.node
    *offsets, end = offsets_of(gate_bytes(node.size), mailbox_bytes(node.size))
    memory = NodeMemory(node, end, comms.waiter)
    gate = make_gate(memory, offsets[0], range(node.size), comms.waiter)
    boxes = make_mailboxes(memory, offsets[1], gate)
    found = []
    for turn in range(ROUNDS):
        if node.rank == turn % node.size:
            time.sleep(5e-4)
        values = np.array([node.rank + 0.1, turn, 1e-3])
        boxes.offer(values)
        boxes.sum(values)
        in_order = np.zeros(3)
        for rank in range(node.size):
            in_order += [rank + 0.1, turn, 1e-3]
        found.append(np.array_equal(values, in_order))
        values = np.array([turn, 7.0] if node.rank == 0 else [-1.0, -1.0])
        boxes.tell(values)
        found.append(values.tolist() == [turn, 7.0])
    collective_assert(comms.world, all(found), found)


@pytest.mark.parametrize("kind", ["shared", "tree"])
def test_sum_everywhere(comms, kind):
    how = make_reduction(kind, comms, owned_by_root(10), Vectors()).reduction
    size = comms.size
    for turn in range(ROUNDS):
        values = np.array([1.0, comms.rank, turn])
        how.sum_everywhere(values)
        collective_assert(comms.world, values.tolist() == [size, size * (size - 1) / 2, size * turn], values)
    how.free()


@pytest.mark.parametrize("n", [1000, 300_000])  # summed by the owner alone, and by all
def test_sums_one_after_the_other(comms, n):
    """Ranks that need no sum run ahead: their next numbers must not reach a sum that is still being formed."""
    how = make_reduction("shared", comms, owned_by_root(n), Vectors()).reduction
    size, sums, good = comms.size, np.empty(3), []
    vector = how.gradient_vector()
    for turn in range(ROUNDS):
        vector[:] = comms.rank + turn
        sums[:] = comms.rank + turn
        if comms.rank == 0:
            time.sleep(5e-4)
        total = how.reduce(sums, vector)
        expected = size * (size - 1) / 2 + size * turn
        good.append(comms.rank != 0 or bool((total == expected).all() and (sums == expected).all()))
        verdict = np.array([1.0, turn] if comms.rank == 0 else [0.0, 0.0])
        how.broadcast(verdict, how.parameter_slots()[0])
        good.append(verdict.tolist() == [1.0, turn])
    collective_assert(comms.world, all(good), good)
    for turn in range(ROUNDS):  # and with no broadcast between
        sums[:] = turn
        if comms.rank in (0, size - 1):
            time.sleep(5e-4 * (turn % 2 if comms.rank else 1))
        how.reduce(sums, vector)
        good.append(comms.rank != 0 or bool((sums == size * turn).all()))
    collective_assert(comms.world, all(good), good)
    how.free()


def test_the_root_does_not_overwrite_rows_that_are_not_taken(comms):
    if comms.topology.n_nodes > 1:
        pytest.skip("rows go down the tree between nodes")
    scatter = SharedScatter(comms, 4, 6)
    good = []
    for turn in range(ROUNDS):
        rows = np.full((6, 4), turn, np.int32) + np.arange(6, dtype=np.int32)[:, None]
        leaf = (np.arange(6) + turn) % comms.size
        if comms.rank == turn % comms.size:
            time.sleep(5e-4)
        mine = scatter.scatter(*((rows, leaf) if comms.rank == 0 else (None, None)))
        good.append(np.array_equal(mine, rows[leaf == comms.rank]))
    collective_assert(comms.world, all(good), good)
