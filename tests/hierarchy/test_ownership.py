"""Who owns which part of the vector: rows by class, everything else evenly, and what carries it."""

import numpy as np
import pytest

from hiermpi.hierarchy.ownership import (
    FREE,
    Ownership,
    assign,
    dealt_out,
    lanes,
    node_sums,
    owned_by_root,
    spans_of,
    water_filled,
)
from hiermpi.hierarchy.topology import Topology
from hiermpi.model.parameters import ParameterLayout, SymmetryTable, TensorSpec
from hiermpi.optimizer.update import norm_blocks

SIZES = [1, 2, 3, 7, 12, 13, 14, 26, 64, 200]


def blocks_of_a_model(vocab_size=500, width=48, order=12):
    specs = [
        TensorSpec("wte.weight", (vocab_size, width), decay=True, symmetry_rows=True),
        *(TensorSpec(f"w{i}", (width, 4 * width), decay=True) for i in range(20)),
        *(TensorSpec(f"b{i}", (width,)) for i in range(20)),
    ]
    groups = (np.arange(vocab_size) % order).astype(np.uint8)
    return norm_blocks(ParameterLayout(specs), SymmetryTable(groups, order).class_bounds)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
def test_rows_belong_to_the_control_of_their_class(size, coordinators):
    topology = Topology(size, coordinators=coordinators)
    bounds, classes = blocks_of_a_model()
    ownership = assign(bounds, classes, topology, "sharded")
    for owner, symmetry_class in zip(ownership.owners, classes, strict=True):
        if symmetry_class >= 0 and size > 1:
            assert owner == topology.group_of_class[symmetry_class] + 1
    if size >= 13:
        table = classes >= 0
        for number in range(1, 13):
            rows = np.diff(bounds)[table & (ownership.owners == number)].sum() / 48
            assert rows <= -(-500 // 12) + 1  # the last class has the table's padding
    if coordinators == "dedicated" and size > 1:
        assert not ownership.spans_of(0)
    assert ownership.ranks == (0, *topology.control_ranks)


@pytest.mark.parametrize("size", [2, 3, 13, 64])
def test_owners_have_about_as_much(size):
    ownership = assign(*blocks_of_a_model(), Topology(size), "sharded")
    shares = [
        sum(stop - start for start, stop, _ in ownership.spans_of(owner)) for owner in range(len(ownership.ranks))
    ]
    assert sum(shares) == ownership.size
    assert max(shares) - min(shares) <= 2 * 4096


def test_the_root_owns_all_under_placement_root():
    ownership = assign(*blocks_of_a_model(), Topology(13), "root")
    assert not ownership.shared_out
    assert [ownership.number(rank) for rank in range(13)] == [0] + 12 * [None]
    assert ownership.spans == [(0, ownership.size, 0)]


def test_numbers_of_ranks():
    ownership = assign(*blocks_of_a_model(), Topology(64, coordinators="dedicated"), "sharded")
    assert ownership.number(0) == 0
    assert ownership.number(1) == 1
    assert ownership.number(7) == 2
    assert ownership.number(2) is None


def test_a_control_rank_that_got_nothing_still_takes_part():
    ownership = Ownership(np.array([0, 4, 8]), np.array([1, 3]), np.array([-1, -1]), range(4))
    assert [ownership.number(rank) for rank in range(5)] == [0, 1, 2, 3, None]


@pytest.mark.parametrize("nodes", [[13], [2, 2], [1, 5, 3], [1, 1, 1], [8, 8, 8, 8]])
@pytest.mark.parametrize("placement", ["root", "sharded"])
def test_lanes_carry_every_element_once_to_the_node_of_its_owner(nodes, placement):
    topology = Topology(sum(nodes), ranks_per_node=tuple(nodes))
    ownership = assign(*blocks_of_a_model(), topology, placement)
    found = np.full(ownership.size, -1)
    carried = lanes(ownership, topology)
    assert len(carried) == min(nodes)
    for spans in carried:
        for start, stop, node in spans:
            assert (found[start:stop] == -1).all()
            found[start:stop] = node
    for start, stop, owner in ownership.spans:
        assert (found[start:stop] == topology.nodes[ownership.ranks[owner]]).all()
    amounts = [sum(stop - start for start, stop, _ in spans) for spans in carried]
    assert max(amounts) - min(amounts) <= 4 * 4096 * len(nodes)


@pytest.mark.parametrize("nodes", [[13], [2, 2], [1, 5, 3], [40, 24]])
@pytest.mark.parametrize("placement", ["root", "sharded"])
@pytest.mark.parametrize("coordinators", ["compute", "dedicated"])
def test_every_node_sums_every_block_once_and_evenly(nodes, placement, coordinators):
    topology = Topology(sum(nodes), ranks_per_node=tuple(nodes), coordinators=coordinators)
    ownership = assign(*blocks_of_a_model(), topology, placement)
    for node, count in enumerate(nodes):
        summed_by = node_sums(ownership, topology, node)
        assert summed_by.min() >= 0
        assert summed_by.max() < count
        shares = np.bincount(summed_by, np.diff(ownership.bounds), minlength=count)
        if node == 0 and coordinators == "dedicated" and count > 1:
            assert shares[0] == 0
            shares = shares[1:]
        assert shares.max() - shares.min() <= 2 * 4096
        here = [rank for rank in range(topology.size) if topology.nodes[rank] == node]
        if placement == "sharded":
            for block in np.flatnonzero(ownership.classes >= 0):
                owner = ownership.ranks[ownership.owners[block]]
                assert owner not in here or here[summed_by[block]] == owner


def test_on_a_node_of_owners_only_everybody_sums_what_it_owns():
    topology = Topology(13)
    ownership = assign(*blocks_of_a_model(), topology, "sharded")
    np.testing.assert_array_equal(node_sums(ownership, topology, 0), np.array(ownership.ranks)[ownership.owners])


@pytest.mark.parametrize(
    ("loads", "more", "expected"), [([0, 0], 10, [5, 5]), ([3, 0], 1, [0, 1]), ([4, 1, 0], 6, [0, 2.5, 3.5])]
)
def test_water_finds_its_level(loads, more, expected):
    np.testing.assert_allclose(water_filled(np.array(loads, float), more), expected)


def test_dealing_keeps_what_is_fixed():
    sizes, fixed = np.array([5, 5, 1, 1, 1, 1]), np.array([1, FREE, 0, FREE, FREE, FREE])
    owners = dealt_out(sizes, fixed, [0, 1, 2])
    assert owners[0] == 1
    assert owners[2] == 0
    assert (owners >= 0).all()


def test_spans_leave_out_nobodys():
    bounds = np.array([0, 2, 5, 7, 9])
    assert spans_of(bounds, np.array([1, 1, -1, 0])) == [(0, 5, 1), (7, 9, 0)]
    assert spans_of(np.array([0]), np.array([], int)) == []


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100_000, 10**7])
def test_a_plain_vector_is_cut_into_blocks(n):
    ownership = owned_by_root(n)
    assert ownership.spans == [(0, n, 0)]
    assert (np.diff(ownership.bounds) > 0).all()
    assert len(ownership.owners) < 3000
