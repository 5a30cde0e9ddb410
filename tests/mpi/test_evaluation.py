"""The evaluator: the mean over all windows, to the same bits on any ranks and in any portions."""

import numpy as np
import pytest
from collective import collective_assert
from mpi4py import MPI

from hiermpi.communication.communicators import Communicators
from hiermpi.config.schema import Config
from hiermpi.model.contract import Batch
from hiermpi.signals import NeverStop
from hiermpi.training.assembly import assemble
from hiermpi.training.batches import EvaluationSource
from hiermpi.training.evaluation import Evaluator, evaluate_alone

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]

CONFIG = Config.of(
    {
        "model.vocab_size": 50,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 24,
        "model.context_length": 8,
        "hierarchy.reduction": "tree",
    }
)


class Tokens:
    """A corpus whose splits differ."""

    symmetry_group = (np.arange(50) % 12).astype(np.uint8)
    counts = np.ones(50, np.int64)

    def __init__(self, n_train, n_val):
        self.tokens = {"train": np.arange(n_train) * 7 % 50, "val": np.arange(n_val) ** 2 % 50}

    def length(self, split):
        return len(self.tokens[split])

    def in_memory(self, split):
        return self.tokens[split].astype(np.uint16)

    def read(self, split, starts, length):
        return self.tokens[split][starts[:, None] + np.arange(length)].astype(np.int32)


def put_together(world, tokens, stopping=None):
    comms = Communicators(world, 12)
    data = tokens if comms.rank == 0 else None
    return comms, assemble(CONFIG, comms, data=data, training=False, stopping=stopping)


def source_of(rank, tokens, split, limit=0):
    return EvaluationSource(tokens, split, 8, rank.model.parameters.row_of_token, limit)


def loss_by_hand(rank, tokens, split):
    """The mean of -log softmax over all targets of the split, window by window, from the logits in float64."""
    text, row = tokens.tokens[split], rank.model.parameters.row_of_token
    total, count = 0.0, 0
    for start in range(0, len(text) - 1, 8):
        window = row[text[start : start + 9]].astype(np.int32)
        inputs = np.zeros((1, 8), np.int32)
        inputs[0, : len(window) - 1] = window[:-1]
        batch = Batch(inputs, inputs, np.zeros(1, np.int64), 0, 0)
        with rank.slots:
            logits = rank.model.logits(batch)[0].astype(np.float64)
        for position, target in enumerate(window[1:]):
            scores = logits[position]
            total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
            count += 1
    return total / count, count


@pytest.mark.parametrize("split", ["train", "val"])
def test_it_is_the_mean_over_all_targets(world, split):
    tokens = Tokens(203, 300)
    comms, rank = put_together(world, tokens)
    found = Evaluator(rank, source_of(rank, tokens, split) if comms.rank == 0 else None, 16).evaluate()
    wanted, count = loss_by_hand(rank, tokens, split)
    good = found.tokens == count and abs(found.loss - wanted) < 1e-5
    collective_assert(world, good, (found, wanted, count))
    rank.free()
    comms.free()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_ranks_and_portions_change_no_bit(world, batch_size, limit):
    """Also where there are fewer windows than ranks, so that some compute nothing."""
    tokens = Tokens(500, 403)
    comms, rank = put_together(world, tokens)
    source = source_of(rank, tokens, "val", limit)
    found = Evaluator(rank, source if comms.rank == 0 else None, batch_size).evaluate()
    with rank.slots:  # ranks of a node may compute in the same memory
        alone = evaluate_alone(rank.model, source)
    collective_assert(world, found == alone, (found, alone))
    collective_assert(world, len(source) == (limit or 51), len(source))
    rank.free()
    comms.free()


def test_nothing_to_evaluate(world):
    tokens = Tokens(100, 1)
    comms, rank = put_together(world, tokens)
    found = Evaluator(rank, source_of(rank, tokens, "val") if comms.rank == 0 else None, 8).evaluate()
    collective_assert(world, found == (0.0, 0), found)
    rank.free()
    comms.free()


class StopAt(NeverStop):
    """Asks for a stop from the n-th question on."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def requested(self):
        self.left -= 1
        return self.left < 0


def test_a_request_on_one_rank_ends_it_on_all(world):
    tokens = Tokens(100, 4000)
    stopping = StopAt(1) if world.rank == world.size - 1 else NeverStop()
    comms, rank = put_together(world, tokens, stopping)
    evaluator = Evaluator(rank, source_of(rank, tokens, "val") if comms.rank == 0 else None, 8)
    collective_assert(world, evaluator.n_windows > 2 * evaluator.batch_size, evaluator.n_windows)
    collective_assert(world, evaluator.evaluate() is None)
    rank.free()
    comms.free()


def test_it_is_the_same_as_on_one_rank(world):
    tokens = Tokens(100, 333)
    found = []
    for comm in (world, MPI.COMM_SELF):
        comms, rank = put_together(comm, tokens)
        found.append(Evaluator(rank, source_of(rank, tokens, "val") if comms.rank == 0 else None, 32).evaluate())
        rank.free()
        comms.free()
    collective_assert(world, found[0] == found[1], found)
