"""Turns: no more ranks at once than places, each place with one rank, everyone served, nothing lost by an error."""

import os
import time

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.compute_slots import NodeCores, NodeTurns, Turns, make_turns, node_cores
from hiermpi.communication.shared_memory import LINE, NodeMemory, node_library
from hiermpi.config.schema import ModelConfig
from hiermpi.model.contract import Batch
from hiermpi.model.transformer import Transformer

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(node_library() is None, reason="node.c was not built")]
ROUNDS = 20


@pytest.fixture
def comms(world):
    made = Communicators(world, 12)
    yield made
    made.free()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_place_has_one_rank(comms, ranks):
    node = comms.node
    start = LINE * NodeTurns.lines(node.size, ranks)
    memory = NodeMemory(node, start + 8 * ranks, comms.waiter)
    holders, places, good = memory.array(start, (ranks,), np.int64), [], []
    turns = NodeTurns(memory, ranks, places.append, comms.waiter)
    comms.waiter.wait(node.Ibarrier())
    for turn in range(ROUNDS):
        with turns:
            place = places[-1]
            holders[place] = node.rank + 1
            if turn % 5 == node.rank % 5:
                time.sleep(2e-4)
            good.append(0 <= place < ranks and holders[place] == node.rank + 1)
    collective_assert(comms.world, len(places) == ROUNDS and all(good), (places, good))


def test_a_turn_ends_with_an_error(comms):
    node = comms.node
    memory = NodeMemory(node, LINE * NodeTurns.lines(node.size, 1), comms.waiter)
    turns = NodeTurns(memory, 1, lambda _: None, comms.waiter)
    comms.waiter.wait(node.Ibarrier())
    for _ in range(3):
        with pytest.raises(ValueError, match="mine"), turns:
            raise ValueError("mine")
    with turns:
        pass
    collective_assert(comms.world, True)


def test_a_turn_is_on_the_core_of_its_place(comms):
    node, usual = comms.node, os.sched_getaffinity(0)
    cores = sorted(usual)[:2]
    memory = NodeMemory(node, LINE * NodeTurns.lines(node.size, len(cores)), comms.waiter)
    places, good = [], []
    turns = NodeTurns(memory, len(cores), places.append, comms.waiter, cores)
    comms.waiter.wait(node.Ibarrier())
    for _ in range(ROUNDS):
        with turns:
            good.append(os.sched_getaffinity(0) == {cores[places[-1]]})
        good.append(os.sched_getaffinity(0) == usual)
    collective_assert(comms.world, all(good), good)


def test_where_cores_cannot_be_chosen_the_system_does(comms, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    memory = NodeMemory(comms.node, LINE * NodeTurns.lines(comms.node.size, 1), comms.waiter)
    places = []
    turns = NodeTurns(memory, 1, places.append, comms.waiter, [0])
    comms.waiter.wait(comms.node.Ibarrier())
    for _ in range(3):
        with turns:
            pass
    collective_assert(comms.world, places == [0, 0, 0], places)


def test_the_cores_of_a_node(comms):
    found = node_cores(comms)
    mine = os.sched_getaffinity(0)
    collective_assert(comms.world, mine <= set(found.cores) and (mine == set(found.cores) or not found.free), found)


def test_shared_workspaces_change_no_bit(comms, monkeypatch):
    """Ranks compute batches of several sizes in the same memory as each alone in its own."""
    monkeypatch.setattr("hiermpi.communication.compute_slots.node_cores", lambda _: NodeCores([0], False))
    config = ModelConfig(vocab_size=40, context_length=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    alone, shared = (Transformer(config, micro_batch_size=3) for _ in range(2))
    turns = make_turns(comms, shared)
    collective_assert(comms.world, (type(turns) is Turns) == (comms.node.size == 1))
    random, good = np.random.default_rng(comms.rank), []
    for model in (alone, shared):
        model.initialize(1)
    for step in range(8):
        sequences, length = 1 + (comms.rank + step) % 5, 16 - step
        tokens = random.integers(0, 40, (sequences, length + 1)).astype(np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(sequences), 1, step)
        gradients = [model.parameters.new_vector() for model in (alone, shared)]
        expected = alone.write_gradients(batch, gradients[0])
        with turns:
            found = shared.write_gradients(batch, gradients[1])
        good.append(expected == found and np.array_equal(*gradients))
    collective_assert(comms.world, all(good), good)
