"""The transportation problem against scipy's solver, and its optimality certificate at full size."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from hiermpi.hierarchy.transport import assign


def value(affinity, bins):
    return int(affinity[np.arange(len(affinity)), bins].sum())


def best_value(affinity, capacity):
    columns = np.repeat(np.arange(len(capacity)), capacity)
    rows, chosen = linear_sum_assignment(affinity[:, columns], maximize=True)
    return int(affinity[:, columns][rows, chosen].sum())


@pytest.mark.parametrize("largest", [0, 1, 3, 20, 10**6])
def test_optimal_on_small_cases(largest):
    generator = np.random.default_rng(largest)
    for _ in range(200):
        n, bins = int(generator.integers(0, 15)), int(generator.integers(1, 7))
        affinity = generator.integers(0, largest + 1, (n, bins))
        capacity = generator.integers(0, 6, bins)
        capacity[0] += max(0, n - capacity.sum())
        chosen = assign(affinity, capacity)
        assert (np.bincount(chosen, minlength=bins) <= capacity).all()
        assert value(affinity, chosen) == best_value(affinity, capacity)
        assert np.array_equal(chosen, assign(affinity, capacity))


def collapsed_text(generator, n):
    """Counts as real text has them: one group is nearly everybody's favourite; the root's bin has no affinity."""
    weights = np.r_[0.2, np.full(11, 0.8 / 11)]
    return np.append(generator.multinomial(256, weights, n), np.zeros((n, 1), np.int64), axis=1)


def test_no_exchange_improves_a_full_size_assignment():
    """Optimal iff no cycle or path of moves between bins gains: no negative cycle in the graph of cheapest moves."""
    affinity = collapsed_text(np.random.default_rng(1), 4096)
    capacity = np.full(13, 316)  # 12 places to spare
    chosen = assign(affinity, capacity)
    load = np.bincount(chosen, minlength=13)
    assert (load <= capacity).all()
    cost = np.full((14, 14), np.inf)  # the last node is room: leaving it free costs nothing
    for source in range(13):
        units = affinity[chosen == source]
        cost[source, :13] = (units[:, [source]] - units).min(axis=0)
        cost[13, source] = 0
        if load[source] < capacity[source]:
            cost[source, 13] = 0
    for middle in range(14):
        cost = np.minimum(cost, cost[:, [middle]] + cost[[middle], :])
    assert (np.diag(cost) >= 0).all()


def test_capacities_that_do_not_suffice_are_refused():
    with pytest.raises(ValueError, match="5 units do not fit into a capacity of 4"):
        assign(np.zeros((5, 2), np.int64), np.array([1, 3]))


def test_empty_and_closed_bins():
    assert assign(np.zeros((0, 3), np.int64), np.zeros(3, np.int64)).tolist() == []
    assert assign(np.array([[5, 1], [7, 2]]), np.array([0, 2])).tolist() == [1, 1]
    assert assign(np.array([[5], [7]]), np.array([2])).tolist() == [0, 0]
