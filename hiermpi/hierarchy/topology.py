"""This module arranges the ranks as a tree: one root, a control rank per group, and workers below them.

The ranks but the root, in node order, are cut into G contiguous blocks whose sizes differ by at most one; the first
rank of a block is its control rank, the rest are its workers. With fewer groups than symmetry classes, class c belongs
to group c modulo G. All of it is arithmetic, so that ``plan`` can compute it for any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IDLE = 0.1
"""The share of the cores' time that may be idle while the last ranks compute: slots on fixed cores save more."""


class Role(StrEnum):
    """The role of a rank in the hierarchy."""

    ROOT = "root"
    CONTROL = "control"
    WORKER = "worker"


def block_bounds(n: int, parts: int) -> list[int]:
    """Return ``parts + 1`` bounds that cut ``range(n)`` into contiguous blocks whose sizes differ by at most one.

    The larger blocks come first: ``block_bounds(7, 3) == [0, 3, 5, 7]``.
    """
    base, larger = divmod(n, parts)
    return [i * base + min(i, larger) for i in range(parts + 1)]


def nodes_by_count(size: int, ranks_per_node: int | Sequence[int]) -> list[int]:
    """Return the node of each rank when ranks fill the nodes one after another.

    Args:
        size: The number of ranks.
        ranks_per_node: One number for all nodes (0 puts all on one), or one per node, which must add up to ``size``.

    Raises:
        ValueError: A number is negative, or the numbers do not add up to ``size``.
    """
    if isinstance(ranks_per_node, int):
        if ranks_per_node < 0:
            raise ValueError(f"ranks_per_node = {ranks_per_node}: expected 0 (one node) or more")
        return [rank // (ranks_per_node or size) for rank in range(size)]
    if sum(ranks_per_node) != size:
        raise ValueError(f"ranks_per_node adds up to {sum(ranks_per_node)} ranks, there are {size}")
    return [node for node, count in enumerate(ranks_per_node) for _ in range(count)]


@dataclass(frozen=True)
class Topology:
    """The topology has the role, group and node of every rank.

    Args:
        size: The number of ranks, at least 1.
        symmetry_order: The number of symmetry classes of the model, S.
        ranks_per_node: The ranks of each node, see :func:`nodes_by_count`; ignored where ``node_of_rank`` is given.
        node_of_rank: The node of each rank, in any numbering (as MPI found it).
        coordinators: ``compute`` (every rank computes) or ``dedicated`` (only ranks with no rank below them compute).

    Raises:
        ValueError: There is no rank or class, ``coordinators`` is unknown, or the node data do not fit ``size``.
    """

    size: int
    symmetry_order: int = 12
    ranks_per_node: int | tuple[int, ...] = 0
    node_of_rank: tuple[int, ...] | None = None
    coordinators: str = "compute"

    def __post_init__(self) -> None:
        if self.size < 1 or self.symmetry_order < 1:
            raise ValueError(f"size = {self.size}, symmetry_order = {self.symmetry_order}: expected at least 1 each")
        if self.coordinators not in ("compute", "dedicated"):
            raise ValueError(f'coordinators = "{self.coordinators}": expected compute or dedicated')
        if self.node_of_rank is None:
            object.__setattr__(self, "node_of_rank", tuple(nodes_by_count(self.size, self.ranks_per_node)))
        elif len(self.node_of_rank) != self.size:
            raise ValueError(f"node_of_rank has {len(self.node_of_rank)} entries for {self.size} ranks")

    @cached_property
    def n_groups(self) -> int:
        """Return the number of groups G: the symmetry order, or fewer where there are not enough ranks."""
        return min(self.symmetry_order, self.size - 1)

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """Return the node of each rank; nodes are numbered from 0 in the order of their first rank."""
        assert self.node_of_rank is not None
        number: dict[int, int] = {}
        return tuple(number.setdefault(node, len(number)) for node in self.node_of_rank)

    @property
    def n_nodes(self) -> int:
        """Return the number of nodes."""
        return max(self.nodes) + 1

    @cached_property
    def ranks_of_node(self) -> tuple[tuple[int, ...], ...]:
        """Return the ranks of each node."""
        found: list[list[int]] = [[] for _ in range(self.n_nodes)]
        for rank, node in enumerate(self.nodes):
            found[node].append(rank)
        return tuple(tuple(ranks) for ranks in found)

    @cached_property
    def leaves_of_node(self) -> tuple[int, ...]:
        """Return how many ranks of each node compute."""
        return tuple(sum(map(self.is_leaf, ranks)) for ranks in self.ranks_of_node)

    @property
    def layout(self) -> str:
        """Return a description of the ranks and of those of each node; a timed choice is valid for one description."""
        counts = [len(ranks) for ranks in self.ranks_of_node]
        each = str(counts[0]) if len(set(counts)) == 1 else ",".join(map(str, counts))
        return f"{self.size} ranks, {each} a node"

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the ranks of each group, with its control rank first."""
        if self.n_groups == 0:
            return ()
        ordered = sorted(range(1, self.size), key=lambda rank: (self.nodes[rank], rank))
        bounds = block_bounds(self.size - 1, self.n_groups)
        return tuple(tuple(ordered[a:b]) for a, b in pairwise(bounds))

    @cached_property
    def control_ranks(self) -> tuple[int, ...]:
        """Return the control rank of each group."""
        return tuple(members[0] for members in self.groups)

    @cached_property
    def group_of_rank(self) -> tuple[int, ...]:
        """Return the group of each rank; it is -1 for the root, which is in none."""
        group = [-1] * self.size
        for index, members in enumerate(self.groups):
            for rank in members:
                group[rank] = index
        return tuple(group)

    @cached_property
    def group_of_class(self) -> NDArray[np.int64]:
        """Return the (S,) group to which each symmetry class belongs; all are 0 where there is only the root."""
        return np.arange(self.symmetry_order) % max(self.n_groups, 1)

    def role(self, rank: int) -> Role:
        """Return the role of ``rank``."""
        if rank == 0:
            return Role.ROOT
        return Role.CONTROL if self.groups[self.group_of_rank[rank]][0] == rank else Role.WORKER

    def is_leaf(self, rank: int) -> bool:
        """Tell whether ``rank`` computes gradients."""
        if self.coordinators == "compute" or self.size == 1:
            return True
        if rank == 0:
            return False
        members = self.groups[self.group_of_rank[rank]]
        return rank != members[0] or len(members) == 1

    @cached_property
    def bins(self) -> tuple[tuple[int, ...], ...]:
        """Return the leaves of each routing bin: one bin per group, and a last one for the root.

        The root's bin is empty where the root does not compute.
        """
        leaves = tuple(tuple(rank for rank in members if self.is_leaf(rank)) for members in self.groups)
        return (*leaves, (0,) if self.is_leaf(0) else ())

    @property
    def n_leaves(self) -> int:
        """Return the number of ranks that compute."""
        return sum(len(leaves) for leaves in self.bins)


def compute_slots(leaves: int, cores: int) -> int:
    """Return how many ranks of a node compute at the same time: few, so that each finds its memory in the caches.

    There is one slot for each core where that leaves few cores idle in the last round. Else there are so many more that
    the last round has a rank for each core too: with equal work, a round of fewer ranks takes as long as a full one.
    There is a slot for each rank where no other number will do.

    Args:
        leaves: The number of ranks of the node that compute.
        cores: The number of cores that they may use.
    """
    cores = max(cores, 1)
    if cores <= leaves and -leaves % cores <= IDLE * leaves:
        return cores
    for ranks in range(cores, leaves):
        if leaves % ranks == 0 or leaves % ranks >= cores:
            return ranks
    return max(leaves, 1)
