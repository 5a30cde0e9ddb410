"""The tree, for every size from 1 to 4096 and for uneven nodes."""

import random
from itertools import pairwise

import pytest

from hiermpi.hierarchy.topology import Role, Topology, block_bounds, nodes_by_count


@pytest.mark.parametrize("order", [1, 2, 3, 12])
def test_every_size_has_one_root_and_balanced_groups(order):
    for size in range(1, 4097 if order == 12 else 200):
        topology = Topology(size, order)
        groups = min(order, size - 1)
        assert topology.n_groups == groups == len(topology.groups)
        members = [rank for group in topology.groups for rank in group]
        assert members == list(range(1, size))  # one node: contiguous, nobody lost, nobody twice
        sizes = [len(group) for group in topology.groups]
        assert not sizes or max(sizes) - min(sizes) <= 1
        assert topology.n_leaves == size


def test_roles_follow_from_the_place_in_the_group():
    for size in (1, 2, 3, 13, 14, 26, 64, 1000):
        topology = Topology(size)
        roles = [topology.role(rank) for rank in range(size)]
        assert roles[0] is Role.ROOT
        assert roles.count(Role.ROOT) == 1
        assert roles.count(Role.CONTROL) == topology.n_groups
        assert [rank for rank in range(size) if roles[rank] is Role.CONTROL] == sorted(topology.control_ranks)
        assert topology.group_of_rank[0] == -1
        for index, group in enumerate(topology.groups):
            assert {topology.group_of_rank[rank] for rank in group} == {index}


def test_64_ranks_are_the_layout_of_the_design():
    topology = Topology(64)
    assert [len(group) for group in topology.groups] == [6, 6, 6, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    assert sum(topology.role(rank) is Role.WORKER for rank in range(64)) == 51
    assert Topology(64, coordinators="dedicated").n_leaves == 51


def test_classes_fold_onto_fewer_groups():
    assert Topology(1).group_of_class.tolist() == [0] * 12
    assert Topology(4).group_of_class.tolist() == [0, 1, 2] * 4
    assert Topology(13).group_of_class.tolist() == list(range(12))
    assert Topology(500, 5).group_of_class.tolist() == list(range(5))


def test_dedicated_coordinators_compute_only_with_nobody_below():
    for size in range(1, 300):
        topology = Topology(size, coordinators="dedicated")
        leaves = {rank for rank in range(size) if topology.is_leaf(rank)}
        assert leaves == {rank for members in topology.bins for rank in members}
        assert leaves
        if size > 1:
            assert 0 not in leaves
            below = {rank for group in topology.groups for rank in group[1:]}
            alone = {group[0] for group in topology.groups if len(group) == 1}
            assert leaves == below | alone


def test_uneven_nodes_keep_groups_together():
    generator = random.Random(3)
    for _ in range(300):
        counts = [generator.randint(1, 9) for _ in range(generator.randint(1, 12))]
        size = sum(counts)
        node_of_rank = [node for node, count in enumerate(counts) for _ in range(count)]
        generator.shuffle(node_of_rank)
        topology = Topology(size, node_of_rank=tuple(node_of_rank))
        order = [rank for group in topology.groups for rank in group]
        assert sorted(order) == list(range(1, size))
        nodes = [topology.nodes[rank] for rank in order]
        assert nodes == sorted(nodes)
        assert topology.n_nodes == len(set(node_of_rank))


def test_ranks_per_node_by_number_and_by_list():
    assert nodes_by_count(5, 2) == [0, 0, 1, 1, 2]
    assert nodes_by_count(5, 0) == [0] * 5
    assert nodes_by_count(5, (1, 4)) == [0, 1, 1, 1, 1]
    assert Topology(5, ranks_per_node=(1, 4)).n_nodes == 2
    with pytest.raises(ValueError, match=r"7 ranks, there are 5"):
        nodes_by_count(5, (3, 4))


def test_wrong_arguments_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="size = 0"):
        Topology(0)
    with pytest.raises(ValueError, match="both"):
        Topology(3, coordinators="both")
    with pytest.raises(ValueError, match="2 entries for 3 ranks"):
        Topology(3, node_of_rank=(0, 0))


def test_block_bounds_partition_a_range():
    for n in range(60):
        for parts in range(1, 20):
            bounds = block_bounds(n, parts)
            sizes = [b - a for a, b in pairwise(bounds)]
            assert bounds[0] == 0
            assert bounds[-1] == n
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
