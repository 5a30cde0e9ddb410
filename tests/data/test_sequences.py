"""Each sequence once an epoch, and nothing depends on how a run is cut."""

import numpy as np
import pytest

from hiermpi.data.sequences import Sampler, evaluation_windows


def test_each_sequence_once_an_epoch():
    sampler = Sampler(1000, 16, seed=1)
    drawn = sampler.draw(0, 2 * sampler.n_sequences)
    for epoch in (0, 1):
        part = drawn.sequence_ids[epoch * sampler.n_sequences : (epoch + 1) * sampler.n_sequences]
        assert sorted(part) == list(range(sampler.n_sequences))


def test_windows_lie_within_the_split_and_do_not_overlap():
    for n_tokens in (17, 18, 32, 33, 34, 100, 1000):
        sampler = Sampler(n_tokens, 16, seed=2)
        for epoch in range(5):
            starts = np.sort(sampler.draw(epoch * sampler.n_sequences, sampler.n_sequences).starts)
            assert starts[0] >= 0
            assert starts[-1] + 17 <= n_tokens
            assert (np.diff(starts) == 16).all()


def test_a_batch_is_a_function_of_seed_and_cursor_alone():
    whole = Sampler(5000, 8, seed=3).draw(0, 3000)
    sampler = Sampler(5000, 8, seed=3)
    for cursor, size in ((700, 300), (0, 10), (1500, 1400)):
        part = sampler.draw(cursor, size)
        assert np.array_equal(part.starts, whole.starts[cursor : cursor + size])
    assert not np.array_equal(Sampler(5000, 8, seed=4).draw(0, 100).starts, whole.starts[:100])


def test_offsets_differ_between_epochs():
    sampler = Sampler(5000, 50, seed=5)
    offsets = {int(sampler.draw(e * sampler.n_sequences, 1).starts[0]) % 50 for e in range(20)}
    assert len(offsets) > 5


def test_a_corpus_shorter_than_one_context_is_refused():
    with pytest.raises(ValueError, match=r"16 tokens are fewer than the 17"):
        Sampler(16, 16, seed=0)
    assert Sampler(17, 16, seed=0).draw(0, 3).starts.tolist() == [0, 0, 0]


def test_evaluation_covers_every_target_once():
    for n_tokens in (2, 16, 17, 18, 100, 129):
        windows = evaluation_windows(n_tokens, 16)
        targets = np.concatenate([s + 1 + np.arange(n) for s, n in zip(*windows, strict=True)])
        assert targets.tolist() == list(range(1, n_tokens))


def test_limited_evaluation_spreads_over_the_split():
    windows = evaluation_windows(16_001, 16, limit=10)
    assert len(windows.starts) == 10
    assert windows.starts.tolist() == [1600 * i for i in range(10)]
    assert len(evaluation_windows(10, 16, limit=4).starts) == 1
