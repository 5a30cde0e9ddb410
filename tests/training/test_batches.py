"""What the root prepares is a function of the data and the cursor, wherever the data is and the run began."""

from dataclasses import dataclass

import numpy as np
import pytest

from hiermpi.data.sequences import Sampler, unpack_records
from hiermpi.hierarchy.routing import Router
from hiermpi.hierarchy.topology import Topology
from hiermpi.training.batches import BatchSource

VOCAB, CONTEXT = 60, 24


@dataclass
class OnDisk:
    """Tokens that are read when asked for."""

    tokens: np.ndarray

    def length(self, split):
        return len(self.tokens)

    def read(self, split, starts, length):
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int32)


class InMemory(OnDisk):
    def in_memory(self, split):
        return self.tokens


def make_source(kind, size=13, batch_size=30, unit_size=1, n_tokens=20_000, mode="balanced"):
    tokens = np.minimum(np.random.default_rng(5).geometric(0.04, n_tokens), VOCAB).astype(np.uint16) - 1
    groups = (np.arange(VOCAB) % 12).astype(np.uint8)
    router = Router(Topology(size), mode, groups, np.bincount(tokens, minlength=VOCAB), unit_size)
    row_of_token = np.random.default_rng(6).permutation(VOCAB)
    return BatchSource(kind(tokens), Sampler(n_tokens, CONTEXT, 9), router, row_of_token, batch_size)


def batches(source, first, count):
    made = (source.take(first + index * source.batch_size) for index in range(count))  # rows do not last
    return [(batch.records.tolist(), batch.dealt.leaf.tolist()) for batch in made]


@pytest.mark.parametrize("mode", ["balanced", "dominant"])
@pytest.mark.parametrize("size", [1, 2, 13])
@pytest.mark.parametrize("unit_size", [1, 4])
def test_the_same_from_memory_as_from_disk(size, unit_size, mode):
    arguments = {"size": size, "unit_size": unit_size, "mode": mode}
    assert batches(make_source(InMemory, **arguments), 0, 4) == batches(make_source(OnDisk, **arguments), 0, 4)


@pytest.mark.parametrize("n_tokens", [20_000, 700])  # the second: several epochs
def test_a_run_that_begins_later_gets_the_same(n_tokens):
    whole = batches(make_source(InMemory, n_tokens=n_tokens), 0, 6)
    assert batches(make_source(InMemory, n_tokens=n_tokens), 3 * 30, 3) == whole[3:]


def test_rows_are_the_tokens_that_were_drawn():
    source = make_source(InMemory)
    batch = source.take(60)
    assert (batch.cursor, batch.next_cursor) == (60, 90)
    drawn = Sampler(20_000, CONTEXT, 9).draw(60, 30)
    ids, rows = unpack_records(batch.records)
    assert ids.tolist() == drawn.sequence_ids.tolist()
    tokens = source.tokens.read("train", drawn.starts, CONTEXT + 1)
    assert np.array_equal(rows, source.row_of_token[tokens])


def test_no_leaf_gets_more_than_its_share():
    source = make_source(InMemory)
    for index in range(5):
        assert np.bincount(source.take(30 * index).dealt.leaf).max() == 3
