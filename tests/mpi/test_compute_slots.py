"""Compute slots: no more ranks at once than slots, each with one rank, everyone served, nothing lost by an error."""

import os
import time

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.node import (
    ComputeSlots,
    NodeComputeSlots,
    NodeCores,
    NodeMemory,
    make_compute_slots,
    node_cores,
)
from hiermpi.communication.waiting import Waiter
from hiermpi.config.schema import ModelConfig
from hiermpi.kernels.gates import SlotQueue, can_sleep
from hiermpi.model.contract import Batch
from hiermpi.model.gpt2 import FAMILY, make_gpt2

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not can_sleep(), reason="gates.c was not built")]
ROUNDS = 20


@pytest.fixture
def comms(world):
    made = Communicators(world, 12)
    yield made
    made.free()


def make_slots(comms, at_once, taken, cores=(), waiter=None, more=0):
    """Slots that append their numbers to ``taken``, and the memory, with ``more`` bytes behind them."""
    start = SlotQueue.nbytes(comms.node.size, at_once)
    memory = NodeMemory(comms.node, start + more, comms.waiter)
    slots = NodeComputeSlots(SlotQueue(memory, at_once, waiter or comms.waiter), taken.append, cores)
    comms.waiter.wait(comms.node.Ibarrier())
    return slots, memory, start


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_every_slot_has_one_rank(comms, at_once):
    node, taken, good = comms.node, [], []
    slots, memory, start = make_slots(comms, at_once, taken, more=8 * at_once)
    holders = memory.array(start, (at_once,), np.int64)
    for turn in range(ROUNDS):
        with slots:
            slot = taken[-1]
            holders[slot] = node.rank + 1
            if turn % 5 == node.rank % 5:
                time.sleep(2e-4)
            good.append(0 <= slot < at_once and holders[slot] == node.rank + 1)
    collective_assert(comms.world, len(taken) == ROUNDS and all(good), (taken, good))


def test_a_slot_is_given_back_after_an_error(comms):
    """A slot that was not given back would never come again: a wait of five seconds fails the test."""
    taken = []
    slots, _, _ = make_slots(comms, 1, taken, waiter=Waiter(stall_abort=5.0))
    raised = 0
    for _ in range(3):
        try:
            with slots:
                raise ValueError("mine")
        except ValueError:
            raised += 1
    with slots:
        pass
    collective_assert(comms.world, raised == 3 and taken == [0] * 4, (raised, taken))


def test_a_slot_that_is_kept_is_waited_for_and_named_as_a_stall(comms):
    """The other way round: who keeps a slot holds up the rest, which is what the test before relies on."""
    taken = []
    slots, _, _ = make_slots(comms, 1, taken, waiter=Waiter(stall_abort=0.2))
    if comms.node.rank == 0:
        slots.__enter__()
    comms.waiter.wait(comms.node.Ibarrier())
    stalled = False
    if comms.node.rank == comms.node.size - 1 and comms.node.size > 1:
        try:
            slots.__enter__()
        except RuntimeError as error:
            stalled = "waited" in str(error)
    comms.waiter.wait(comms.node.Ibarrier())
    last = comms.node.rank == comms.node.size - 1 and comms.node.size > 1
    collective_assert(comms.world, stalled == last, stalled)


def test_a_slot_is_on_its_core(comms):
    usual, taken, good = os.sched_getaffinity(0), [], []
    cores = sorted(usual)[:2]
    slots, _, _ = make_slots(comms, len(cores), taken, cores)
    for _ in range(ROUNDS):
        with slots:
            good.append(os.sched_getaffinity(0) == {cores[taken[-1]]})
        good.append(os.sched_getaffinity(0) == usual)
    collective_assert(comms.world, all(good), good)


def test_where_cores_cannot_be_chosen_the_system_does(comms, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    taken = []
    slots, _, _ = make_slots(comms, 1, taken, [0])
    for _ in range(3):
        with slots:
            pass
    collective_assert(comms.world, taken == [0, 0, 0], taken)


def test_the_cores_of_a_node(comms):
    found = node_cores(comms)
    mine = os.sched_getaffinity(0)
    collective_assert(comms.world, mine <= set(found.cores) and (mine == set(found.cores) or not found.free), found)


def test_shared_workspaces_change_no_bit(comms, monkeypatch):
    """Ranks compute batches of several sizes in the same memory as each alone in its own."""
    monkeypatch.setattr("hiermpi.communication.node.node_cores", lambda _: NodeCores([0], False))
    config = ModelConfig(vocab_size=40, context_length=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    alone, shared = (make_gpt2(config, micro_batch_size=3) for _ in range(2))
    slots = make_compute_slots(comms, shared)
    collective_assert(comms.world, (type(slots) is ComputeSlots) == (comms.node.size == 1))
    random, good = np.random.default_rng(comms.rank), []
    for model in (alone, shared):
        FAMILY.initialize(model, 1)
    for step in range(8):
        sequences, length = 1 + (comms.rank + step) % 5, 16 - step
        tokens = random.integers(0, 40, (sequences, length + 1)).astype(np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(sequences), 1, step)
        gradients = [model.parameters.new_vector() for model in (alone, shared)]
        expected = alone.write_gradients(batch, gradients[0])
        with slots:
            found = shared.write_gradients(batch, gradients[1])
        good.append(expected == found and np.array_equal(*gradients))
    collective_assert(comms.world, all(good), good)


def test_a_model_that_lends_no_memory_takes_turns_too(comms, monkeypatch):
    monkeypatch.setattr("hiermpi.communication.node.node_cores", lambda _: NodeCores([0], False))
    slots = make_compute_slots(comms, object())
    collective_assert(comms.world, (type(slots) is ComputeSlots) == (comms.node.size == 1))
    with slots:
        pass
    collective_assert(comms.world, True)
