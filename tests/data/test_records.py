"""Reading a batch in one pass gives what drawing, mapping and counting one after the other give."""

import numpy as np
import pytest
from forms import both_forms

from hiermpi.data.sequences import Draw, RecordReader, Sampler, unpack_records
from hiermpi.kernels import loops

form = both_forms(loops)


def make_reader(dtype, length, vocab=70, groups=12, n_tokens=5000):
    generator = np.random.default_rng(length)
    tokens = generator.integers(0, vocab, n_tokens).astype(dtype)
    row_of_token = generator.permutation(vocab).astype(np.int32)
    return RecordReader(tokens, length, row_of_token, (np.arange(vocab) % groups).astype(np.uint8), groups + 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 65])
def test_records_and_counts_sequence_by_sequence(dtype, length):
    reader = make_reader(dtype, length)
    drawn = Sampler(len(reader.tokens), length - 1, seed=3).draw(7, 11)
    made, counts = reader.read(drawn)
    ids, mapped = unpack_records(made)
    assert np.array_equal(ids, drawn.sequence_ids)
    for index, start in enumerate(drawn.starts):
        tokens = reader.tokens[start : start + length]
        assert np.array_equal(mapped[index], reader.row_of_token[tokens])
        assert counts[index].tolist() == np.bincount(tokens[:-1] % 12, minlength=13).tolist()


def test_the_last_tokens_of_the_split_are_read():
    reader = make_reader(np.uint16, 9)
    made, _ = reader.read(Draw(np.array([2**40]), np.array([len(reader.tokens) - 9])))
    ids, mapped = unpack_records(made)
    assert ids.tolist() == [2**40]
    assert np.array_equal(mapped[0], reader.row_of_token[reader.tokens[-9:]])


def test_records_last_until_the_call_after_the_next():
    reader = make_reader(np.uint16, 9)
    sampler = Sampler(len(reader.tokens), 8, seed=1)
    first, _ = reader.read(sampler.draw(0, 6))
    before = first.copy()
    reader.read(sampler.draw(6, 6))
    assert np.array_equal(first, before)


def test_more_groups_than_the_compiled_form_has_room_for():
    reader = make_reader(np.uint16, 5, vocab=900, groups=256)
    reader.n_bins = 300
    _, counts = reader.read(Draw(np.array([0]), np.array([10])))
    assert np.array_equal(counts[0], np.bincount(reader.tokens[10:14] % 256, minlength=300))
