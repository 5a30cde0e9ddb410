"""Rows in class-major order, and the way back."""

import numpy as np
import pytest

from hiermpi.model.parameters import SymmetryTable, symmetry_groups

CASES = [(1, 1), (5, 1), (12, 12), (50, 12), (7, 12), (257, 5)]  # vocabulary, order


def random_groups(vocab_size, order):
    return np.random.default_rng(vocab_size).integers(0, order, vocab_size).astype(np.uint8)


@pytest.mark.parametrize(("vocab_size", "order"), CASES)
def test_without_a_table_groups_go_by_modulo(vocab_size, order):
    groups = symmetry_groups(None, vocab_size, order)
    assert groups.dtype == np.uint8
    assert groups.tolist() == [token % order for token in range(vocab_size)]


@pytest.mark.parametrize("known", [0, 3, 10])
def test_ids_beyond_the_table_go_by_modulo(known):
    table = np.full(known, 4, np.uint8)
    assert symmetry_groups(table, 10, 5).tolist() == [4] * known + [token % 5 for token in range(known, 10)]


def test_a_table_longer_than_the_vocabulary_is_cut():
    assert symmetry_groups(np.arange(9, dtype=np.uint8), 4, 9).tolist() == [0, 1, 2, 3]


def test_the_given_table_is_not_changed():
    table = np.array([1, 0], np.uint8)
    symmetry_groups(table, 4, 2)[:] = 9
    assert table.tolist() == [1, 0]


@pytest.mark.parametrize(("vocab_size", "order"), CASES)
def test_rows_are_sorted_by_class_then_id(vocab_size, order):
    groups = random_groups(vocab_size, order)
    table = SymmetryTable(groups, order)
    expected = sorted(range(vocab_size), key=lambda token: (groups[token], token))
    assert table.token_of_row.tolist() == expected


@pytest.mark.parametrize(("vocab_size", "order"), CASES)
def test_the_two_maps_are_inverse(vocab_size, order):
    table = SymmetryTable(random_groups(vocab_size, order), order)
    identity = np.arange(vocab_size)
    np.testing.assert_array_equal(table.row_of_token[table.token_of_row], identity)
    np.testing.assert_array_equal(table.token_of_row[table.row_of_token], identity)


@pytest.mark.parametrize(("vocab_size", "order"), CASES)
def test_each_class_is_one_slice_of_rows(vocab_size, order):
    groups = random_groups(vocab_size, order)
    table = SymmetryTable(groups, order)
    assert len(table.class_bounds) == order + 1
    assert table.class_bounds[0] == 0
    assert table.class_bounds[-1] == vocab_size
    for c in range(order):
        rows = table.token_of_row[table.class_bounds[c] : table.class_bounds[c + 1]]
        assert sorted(rows) == [token for token in range(vocab_size) if groups[token] == c]


def test_a_class_without_tokens_is_an_empty_slice():
    table = SymmetryTable(np.array([3, 1, 3], np.uint8), 5)
    assert table.class_bounds.tolist() == [0, 0, 1, 1, 3, 3]
    assert table.token_of_row.tolist() == [1, 0, 2]
