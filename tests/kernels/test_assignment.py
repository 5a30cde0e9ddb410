"""The transportation problem against scipy's solver when small, against its dual at full size."""

import numpy as np
import pytest
from forms import both_forms
from scipy.optimize import linear_sum_assignment

from hiermpi.kernels import assignment, loops
from hiermpi.kernels.assignment import assign, clearing_prices

BUILT = loops.compiled_loops()
form = both_forms(loops)


def value(affinity, bins):
    return int(affinity[np.arange(len(affinity)), bins].sum())


def best_value(affinity, capacity):
    """The optimum of scipy on the matrix that has each bin's column as often as the bin has places."""
    columns = affinity[:, np.repeat(np.arange(len(capacity)), np.minimum(capacity, len(affinity)))]
    return int(columns[linear_sum_assignment(columns, maximize=True)].sum())


def dual_value(affinity, capacity, chosen):
    """The dual objective: whatever prices of at least 0 it is taken at, no assignment is worth more.

    The prices that support ``chosen`` are shortest distances in the graph of moves between bins, whose last
    node is free room.
    """
    bins = len(capacity)
    loss = np.full((bins + 1, bins + 1), np.inf)
    for source in range(bins):
        inside = affinity[chosen == source]
        loss[source, :bins] = (inside[:, [source]] - inside).min(axis=0, initial=2**60)
    loss[:bins, bins] = np.where(np.bincount(chosen, minlength=bins) < capacity, 0, np.inf)
    loss[bins] = 0
    distance = np.zeros(bins + 1)
    for _ in range(bins):
        distance = np.minimum(distance, (distance[:, None] + loss).min(axis=0))
    prices = -distance[:bins]
    return int((affinity - prices).max(axis=1).sum() + capacity @ prices)


def random_case(generator, n, largest, slack):
    """(affinity, capacity) with uneven capacities, some of them 0, that hold ``slack`` units too many."""
    bins = int(generator.integers(1, 9))
    capacity = generator.multinomial(n + slack, generator.dirichlet(np.full(bins, 0.7)))
    return generator.integers(0, largest + 1, (n, bins)), capacity


@pytest.mark.parametrize("slack", [0, 1, 30])
@pytest.mark.parametrize("largest", [0, 1, 3, 20, 10**6])
def test_the_value_is_the_greatest(largest, slack):
    generator = np.random.default_rng([largest, slack])
    for n in range(1, 70):
        affinity, capacity = random_case(generator, n, largest, slack)
        chosen = assign(affinity, capacity)
        assert (np.bincount(chosen, minlength=len(capacity)) <= capacity).all()
        assert value(affinity, chosen) == best_value(affinity, capacity)


@pytest.mark.parametrize("slack", [0, 3, 100])
def test_a_few_kinds_of_units(slack):
    """Rows that repeat are tied in every move, and so are those that differ by a constant."""
    generator = np.random.default_rng(slack)
    for _ in range(40):
        kinds, capacity = random_case(generator, 80, 9, slack)
        affinity = kinds[generator.integers(0, 3, 80)] + generator.integers(0, 5, (80, 1))
        assert value(affinity, assign(affinity, capacity)) == best_value(affinity, capacity)


@pytest.mark.parametrize("slack", [0, 2])
def test_opposed_preferences(slack):
    """All units rank the bins alike and differ in how much they care: paths lead through many bins."""
    generator = np.random.default_rng(slack)
    for _ in range(20):
        affinity = np.outer(generator.integers(0, 1000, 90), generator.permutation(8))
        capacity = generator.multinomial(90 + slack, np.full(8, 1 / 8))
        assert value(affinity, assign(affinity, capacity)) == best_value(affinity, capacity)


def with_root(counts):
    """A last bin without affinity, as the root's."""
    return np.append(counts, np.zeros((len(counts), 1), np.int64), axis=1)


def full_size_affinity(kind):
    generator = np.random.default_rng(12)
    shape = (4096, 12)
    match kind:
        case "text":  # one group is nearly everybody's favourite, the others are close to each other
            return with_root(generator.multinomial(256, np.r_[0.23, np.full(11, 0.07)], 4096))
        case "wide":
            return with_root(generator.integers(0, 10**6, shape))
        case "tied":
            return with_root(generator.integers(0, 4, shape))
        case "equal":
            return with_root(np.full(shape, 7))
    raise ValueError(kind)


CAPACITIES = {
    "even": np.full(13, 316),
    "exact": np.r_[np.full(12, 315), 316],
    "uneven": np.r_[0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2049],
    "few large": np.r_[np.full(3, 1500), np.full(10, 100)],
    "loose": np.full(13, 700),
}


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=CAPACITIES.keys())
@pytest.mark.parametrize("kind", ["text", "wide", "tied", "equal"])
def test_full_size_has_no_gap_to_the_dual(kind, capacity):
    affinity = full_size_affinity(kind)
    chosen = assign(affinity, capacity)
    assert (np.bincount(chosen, minlength=13) <= capacity).all()
    assert value(affinity, chosen) == dual_value(affinity, capacity, chosen)


@pytest.mark.parametrize("kind", ["text", "wide", "tied", "equal"])
def test_good_prices_leave_few_paths(kind, monkeypatch):
    """Speed without a clock: from no prices at all, thousands of the units would need a path each."""
    monkeypatch.setattr(loops, "compiled_loops", lambda: None)
    paths = []
    move = assignment._Assignment._move
    monkeypatch.setattr(assignment._Assignment, "_move", lambda *args: paths.append(args) or move(*args))
    for capacity in CAPACITIES.values():
        paths.clear()
        assign(full_size_affinity(kind), capacity)
        assert len(paths) < 200


@pytest.mark.parametrize("slack", [0, 3, 40])
@pytest.mark.parametrize("largest", [0, 3, 20, 10**6])
def test_the_value_is_the_greatest_from_any_prices(largest, slack):
    generator = np.random.default_rng([largest, slack])
    for n in (1, 2, 7, 30, 69):
        affinity, capacity = random_case(generator, n, largest, slack)
        other = generator.permuted(affinity, axis=0)
        for prices in (
            clearing_prices(affinity, capacity),
            clearing_prices(other, capacity),
            generator.integers(-largest, 2 * largest + 1, len(capacity)),
        ):
            chosen = assign(affinity, capacity, prices)
            assert (np.bincount(chosen, minlength=len(capacity)) <= capacity).all()
            assert value(affinity, chosen) == best_value(affinity, capacity)


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=CAPACITIES.keys())
@pytest.mark.parametrize("kind", ["text", "wide", "tied", "equal"])
def test_clearing_prices_are_those_of_a_best_assignment(kind, capacity):
    """At them what units get and bins take is the value, and they leave nothing to be moved but what is tied."""
    affinity = full_size_affinity(kind)
    prices = clearing_prices(affinity, capacity)
    chosen = assign(affinity, capacity, prices)
    net = affinity - prices
    assert prices.min() == 0
    assert value(affinity, chosen) == int(net.max(axis=1).sum() + capacity @ prices)
    assert (net[np.arange(len(net)), chosen] == net.max(axis=1)).all()


def test_the_dual_notices_a_worse_assignment():
    affinity, capacity = full_size_affinity("text"), CAPACITIES["even"]
    chosen = assign(affinity, capacity)
    first, second = np.flatnonzero(chosen == 0)[0], np.flatnonzero(chosen == 12)[0]
    chosen[[first, second]] = chosen[[second, first]]
    assert value(affinity, chosen) < dual_value(affinity, capacity, chosen)


def test_a_pure_function_of_its_arguments():
    affinity, capacity = full_size_affinity("tied"), CAPACITIES["even"].copy()
    chosen = assign(affinity, capacity)
    for array in (affinity, capacity):
        array.flags.writeable = False
    assert np.array_equal(chosen, assign(affinity, capacity))
    assert np.array_equal(chosen, assign(np.asfortranarray(affinity), capacity))


def test_places_left_over_stay_empty():
    # Two bins worth nothing beside one with room for all: nobody has a reason to leave it.
    affinity = np.zeros((50, 3), np.int64)
    affinity[:, 1] = np.arange(1, 51)
    assert assign(affinity, np.array([50, 2**62, 7])).tolist() == [1] * 50


def test_fewer_units_than_bins():
    affinity = np.array([[0, 9, 8, 0, 0], [0, 9, 2, 0, 1]])
    assert assign(affinity, np.ones(5, np.int64)).tolist() == [2, 1]


def test_closed_bins():
    assert assign(np.array([[5, 1], [7, 2]]), np.array([0, 2])).tolist() == [1, 1]
    affinity = np.tile([9, 0, 9, 0], (100, 1))
    assert np.bincount(assign(affinity, np.array([0, 60, 0, 40]))).tolist() == [0, 60, 0, 40]


def test_one_bin_and_no_units():
    assert assign(np.array([[5], [7]]), np.array([2])).tolist() == [0, 0]
    assert assign(np.zeros((9, 1), np.int64), np.array([20])).tolist() == [0] * 9
    assert assign(np.zeros((0, 3), np.int64), np.zeros(3, np.int64)).tolist() == []


def test_capacities_that_do_not_suffice_are_refused():
    with pytest.raises(ValueError, match="5 units do not fit into a capacity of 4"):
        assign(np.zeros((5, 2), np.int64), np.array([1, 3]))


def priced_cases(largest):
    """Cases of up to 300 units, and prices that may fit or not."""
    generator = np.random.default_rng(largest)
    for n in (1, 2, 5, 17, 60, 300):
        for slack in (0, 2, 40):
            affinity, capacity = random_case(generator, n, largest, slack)
            yield affinity, capacity, generator.integers(0, largest + 2, len(capacity))


def made_in_both_forms(monkeypatch, make):
    """What ``make`` returns with loops.c, and without."""
    made = []
    for built in (BUILT, None):
        monkeypatch.setattr(loops, "compiled_loops", lambda built=built: built)
        made.append(make())
    return made


@pytest.mark.skipif(BUILT is None, reason="loops.c was not built")
@pytest.mark.parametrize("largest", [0, 1, 3, 20, 10**6])
def test_the_compiled_form_begins_at_prices_as_numpy_does(largest, monkeypatch):
    for affinity, capacity, prices in priced_cases(largest):
        compiled, numpy = made_in_both_forms(monkeypatch, lambda case=(affinity, capacity, prices): assign(*case))
        np.testing.assert_array_equal(compiled, numpy)


@pytest.mark.skipif(BUILT is None, reason="loops.c was not built")
@pytest.mark.parametrize("largest", [0, 1, 3, 20, 10**6])
def test_the_compiled_form_makes_the_same_moves(largest, monkeypatch):
    for affinity, capacity, prices in priced_cases(largest):
        case = affinity, np.minimum(capacity, len(affinity)), prices
        compiled, numpy = made_in_both_forms(monkeypatch, lambda case=case: assignment._balanced(*case))
        for part in ("place", "load", "idle", "loss"):
            np.testing.assert_array_equal(getattr(compiled, part), getattr(numpy, part))


@pytest.mark.skipif(BUILT is None, reason="loops.c was not built")
@pytest.mark.parametrize("largest", [0, 1, 20, 10**6])
def test_the_compiled_form_starts_from_no_prices(largest, monkeypatch):
    generator = np.random.default_rng(largest)
    for n in (1, 5, 64, 65, 256):
        for slack in (0, 3, 50):
            affinity, capacity = random_case(generator, n, largest, slack)
            case = affinity, np.minimum(capacity, n), np.zeros(len(capacity), np.int64)
            made = made_in_both_forms(monkeypatch, lambda case=case: assignment._balanced(*case))
            chosen = [found.place for found in made]
            monkeypatch.setattr(loops, "compiled_loops", lambda: BUILT)
            chosen.append(assign(affinity, capacity))
            chosen.append(assign(affinity.astype(np.int32), capacity))
            assert all(np.array_equal(one, chosen[0]) for one in chosen)


@pytest.mark.parametrize("largest", [2**27, 2**30, 2**40])
def test_values_beyond_the_compiled_form(largest):
    generator = np.random.default_rng(1)
    for _ in range(10):
        affinity, capacity = random_case(generator, 30, largest, 2)
        assert value(affinity, assign(affinity, capacity)) == best_value(affinity, capacity)


def test_more_bins_than_lanes():
    generator = np.random.default_rng(5)
    affinity = generator.integers(0, 50, (70, 37))
    capacity = generator.multinomial(75, np.full(37, 1 / 37))
    assert value(affinity, assign(affinity, capacity)) == best_value(affinity, capacity)
