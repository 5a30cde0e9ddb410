"""Sums by messages: every piece where it is for, whatever the tree."""

from itertools import pairwise

import numpy as np
import pytest
from collective import collective_assert

from hiermpi.communication.reduction import spread_pieces
from hiermpi.communication.tree_reduction import children_and_parent, sum_pieces
from hiermpi.communication.waiting import Waiter


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.float64])
@pytest.mark.parametrize("roots", [1, 3])
@pytest.mark.parametrize("lengths", [[], [1], [5, 1, 5, 3, 0, 2], [1000] * 40, [200_000] * 7])
def test_each_piece_is_summed_where_it_is_for(comm, dtype, lengths, roots):
    vector = (np.arange(sum(lengths)) % 1000).astype(dtype) * (comm.rank + 1)
    ends = np.cumsum([0, *lengths])
    pieces = [(vector[a:b], i % min(roots, comm.size)) for i, (a, b) in enumerate(pairwise(ends))]
    sum_pieces(Waiter(), comm, pieces)
    total = np.arange(sum(lengths)) % 1000 * (comm.size * (comm.size + 1) // 2)
    for (piece, root), (a, b) in zip(pieces, pairwise(ends), strict=True):
        collective_assert(comm, root != comm.rank or np.array_equal(piece, total[a:b]), f"{piece[:3]} {total[a:][:3]}")


@pytest.mark.mpi
@pytest.mark.parametrize("roots", [1, 3])
@pytest.mark.parametrize("lengths", [[], [1], [5, 1, 5, 3, 0, 2], [1000] * 40])
def test_each_piece_reaches_everybody(comm, lengths, roots):
    whole = np.arange(sum(lengths)).astype(np.float32)
    mine, ends = np.zeros_like(whole), np.cumsum([0, *lengths])
    pieces = [(mine[a:b], i % min(roots, comm.size)) for i, (a, b) in enumerate(pairwise(ends))]
    for (piece, root), (a, b) in zip(pieces, pairwise(ends), strict=True):
        piece[:] = whole[a:b] if root == comm.rank else -1
    spread_pieces(Waiter(), comm, pieces)
    collective_assert(comm, np.array_equal(mine, whole))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 13, 64, 1000])
def test_the_tree_reaches_everybody_once(size, direct):
    links = [children_and_parent(place, size, direct) for place in range(size)]
    assert links[0][1] is None
    for place, (children, _) in enumerate(links):
        assert all(links[child][1] == place for child in children)
    assert sum(len(children) for children, _ in links) == size - 1
