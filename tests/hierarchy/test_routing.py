"""Every sequence goes to exactly one leaf, and the modes do what their names say."""

import sys
import types

import numpy as np
import pytest

from hiermpi.config.registry import ROUTINGS
from hiermpi.errors import PluginError
from hiermpi.hierarchy.routing import Router, even_leaves
from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels import loops
from hiermpi.kernels.loops import leaves_in_turn

MODES = ("balanced", "dominant", "lift")


def make_router(size, mode, coordinators="compute", vocab=50, unit_size=1):
    group_of_token = (np.arange(vocab) % 12).astype(np.uint8)
    counts = np.arange(1, vocab + 1)
    return Router(Topology(size, coordinators=coordinators), mode, group_of_token, counts, unit_size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 13, 14, 26, 64])
def test_every_sequence_goes_to_one_leaf(size, coordinators, mode):
    router = make_router(size, mode, coordinators)
    tokens = np.random.default_rng(0).integers(0, 50, (37, 20)).astype(np.int32)
    routing = router.route(tokens)
    assert len(routing.leaf) == 37
    for rank, group in zip(routing.leaf, routing.bin, strict=True):
        assert router.topology.is_leaf(rank)
        if size > 1:
            assert rank in router.topology.bins[group]
    assert 0 <= routing.own_tokens <= tokens.size


@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
def test_balanced_gives_no_leaf_more_than_its_share(coordinators):
    for size in (2, 3, 13, 14, 26, 64):
        for batch in (1, 5, 24, 130):
            router = make_router(size, "balanced", coordinators)
            tokens = np.zeros((batch, 16), np.int32)  # the worst case: all prefer one group
            load = np.bincount(router.route(tokens).leaf, minlength=size)
            assert load.max() == -(-batch // router.topology.n_leaves)


def test_dominant_is_the_group_with_most_tokens():
    router = make_router(13, "dominant")
    tokens = np.array([[0, 12, 24, 1, 2], [5, 17, 5, 0, 0], [11, 11, 3, 3, 3]], np.int32)
    assert router.route(tokens).bin.tolist() == [0, 5, 3]


def test_lift_compares_with_the_corpus():
    group_of_token = np.array([0, 1], np.uint8)
    router = Router(Topology(3, 2), "lift", group_of_token, np.array([90, 10]))
    # Token 1 is a third of the sequence, but a tenth of the corpus.
    assert router.route(np.array([[0, 0, 1]], np.int32)).bin.tolist() == [1]
    dominant = Router(Topology(3, 2), "dominant", group_of_token, np.array([90, 10]))
    assert dominant.route(np.array([[0, 0, 1]], np.int32)).bin.tolist() == [0]


def test_balanced_has_at_least_the_affinity_of_any_even_deal():
    router = make_router(13, "balanced")
    tokens = np.random.default_rng(1).integers(0, 50, (26, 30)).astype(np.int32)
    affinity = router.affinity(tokens)
    best = router.route(tokens).own_tokens
    for shift in range(12):
        deal = (np.arange(26) + shift) % 12
        assert np.bincount(deal).max() <= 3  # not within 2 per leaf everywhere, so compare its best 24
        gains = np.sort(affinity[np.arange(26), deal])[::-1][:24]
        assert best >= gains.sum() * 0.9


def test_units_stay_together():
    router = make_router(13, "balanced", unit_size=3)
    tokens = np.random.default_rng(2).integers(0, 50, (25, 8)).astype(np.int32)
    leaf = router.route(tokens).leaf
    for first in range(0, 25, 3):
        assert len(set(leaf[first : first + 3])) == 1


def test_padding_counts_for_nothing():
    router = make_router(13, "dominant")
    tokens = np.array([[3, -1, -1, -1]], np.int32)
    assert router.affinity(tokens).tolist() == [[0, 0, 0, 1] + [0] * 8]


def test_loads_are_counted():
    router = make_router(13, "dominant")
    routing = router.route(np.zeros((5, 4), np.int32))
    router.record(routing)
    router.record(routing)
    assert router.loads.tolist() == [10] + [0] * 12
    assert (router.tokens, router.own_tokens) == (40, 40)


def test_leaves_in_turn_differ_by_at_most_one():
    bins = np.array([0, 1, 0, 0, 1, 0, 0])
    assert leaves_in_turn(bins, [(7, 9), (3,)]).tolist() == [7, 3, 9, 7, 3, 9, 7]


def test_even_leaves_cover_and_balance():
    for size in (1, 2, 13, 30):
        topology = Topology(size)
        for n in (0, 1, 12, 100):
            leaf = even_leaves(n, topology)
            assert len(leaf) == n
            load = np.bincount(leaf, minlength=size)
            assert load.max() - load.min() <= 1


def test_the_compiled_count_is_the_numpy_one(monkeypatch):
    if loops.compiled_loops() is None:
        pytest.skip("loops.c was not built")
    tokens = np.random.default_rng(3).integers(-1, 50, (9, 33)).astype(np.int32)
    router = Router(Topology(5), "balanced", np.arange(50).astype(np.uint8) % 12, np.ones(50, np.int64))
    for part in (tokens, tokens[:, :-1], tokens[::2, 3:7], tokens[:0], tokens[:, ::2]):
        compiled = router.affinity(part)
        with monkeypatch.context() as patch:
            patch.setattr(loops, "compiled_loops", lambda: None)
            np.testing.assert_array_equal(compiled, router.affinity(part))


@pytest.mark.parametrize("unit_size", [1, 4])
@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
def test_the_compiled_dealing_is_the_numpy_one(coordinators, unit_size, monkeypatch):
    if loops.compiled_loops() is None:
        pytest.skip("loops.c was not built")
    router = make_router(30, "balanced", coordinators, unit_size=unit_size)
    generator = np.random.default_rng(unit_size)
    for batch in (1, 4, 77):
        counts = router.counts(generator.integers(-1, 50, (batch, 20)).astype(np.int32))
        unit_bin = generator.choice(np.flatnonzero(router._leaves), -(-batch // unit_size))
        arguments = (counts, unit_bin, unit_size, router._ranks, router._bounds)
        compiled = loops.deal(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(loops, "compiled_loops", lambda: None)
            plain = loops.deal(*arguments)
        assert np.array_equal(compiled.leaf, plain.leaf)
        assert np.array_equal(compiled.bin, plain.bin)
        assert compiled[2:] == plain[2:]


@pytest.mark.parametrize("unit_size", [1, 4])
@pytest.mark.parametrize("batch", [5, 26, 130, 600])
def test_what_was_learned_changes_no_share(batch, unit_size):
    generator = np.random.default_rng(batch)
    tokens = np.minimum(generator.geometric(0.05, (batch, 40)), 50).astype(np.int32) - 1
    fresh, learned = (make_router(13, "balanced", unit_size=unit_size) for _ in range(2))
    learned.learn(learned.counts(tokens[::-1]))
    routing = learned.route(tokens)
    assert routing.own_tokens == fresh.route(tokens).own_tokens
    units = -(-batch // unit_size)
    assert np.bincount(routing.leaf[::unit_size], minlength=13).max() <= -(-units // 13)


def choose_bin(number):
    """Make a rule that gives every unit the same bin."""
    return lambda counts, _capacity, _frequency: np.full(len(counts), number)


@pytest.mark.parametrize("number", [-1, 13, 10**6])
def test_a_bin_that_is_not_is_refused_before_it_is_used(number, monkeypatch):
    place = f"{__name__}:RULE"
    with pytest.raises(PluginError, match=f"it chose bin {number} for unit 0: expected one of 0, 1, "):
        make_router(13, choose_bin(number)).route(np.zeros((5, 8), np.int32))
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.ModuleType(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "RULE", choose_bin(number), raising=False)
    monkeypatch.setattr(ROUTINGS, "_places", dict(ROUTINGS._places))
    ROUTINGS.add("registered", place)
    with pytest.raises(PluginError, match=f"hierarchy.routing = registered: it chose bin {number}"):
        make_router(13, "registered").route(np.zeros((5, 8), np.int32))


def test_a_bin_without_a_leaf_is_refused():
    with pytest.raises(PluginError, match="it chose bin 12"):
        make_router(14, choose_bin(12), coordinators="dedicated").route(np.zeros((5, 8), np.int32))


def test_what_a_rule_from_outside_is_given_cannot_be_written():
    given = []

    class Rule:
        def learn(self, counts, capacity):
            given.extend([counts, capacity])

        def __call__(self, counts, capacity, frequency):
            given.extend([counts, capacity, frequency])
            return np.zeros(len(counts), np.int64)

    router = make_router(13, Rule)
    router.learn(router.counts(np.zeros((5, 8), np.int32)))
    router.route(np.zeros((5, 8), np.int32))
    assert len(given) == 5
    assert not any(array.flags.writeable for array in given)
    assert router.frequency.flags.writeable
