"""The tree of ranks: one root, a control rank per symmetry group, workers below them.

Non-root ranks, in node order, are cut into G contiguous blocks whose sizes differ by at most one; the first of a
block is its control rank, the rest are its workers. With fewer groups than symmetry classes, class c belongs to
group c modulo G. All of it is arithmetic, so that ``plan`` can answer for a machine it is not on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IDLE = 0.1
"""Of the cores' time that may be idle while the last ranks compute: turns on cores of their own save more."""


class Role(StrEnum):
    """What a rank is for."""

    ROOT = "root"
    CONTROL = "control"
    WORKER = "worker"


def block_bounds(n: int, parts: int) -> list[int]:
    """``parts + 1`` bounds that cut ``range(n)`` into contiguous blocks whose sizes differ by at most one.

    The larger blocks come first: ``block_bounds(7, 3) == [0, 3, 5, 7]``.
    """
    base, larger = divmod(n, parts)
    return [i * base + min(i, larger) for i in range(parts + 1)]


def nodes_by_count(size: int, ranks_per_node: int | Sequence[int]) -> list[int]:
    """Node of each rank when ranks fill the nodes one after another.

    Args:
        size: number of ranks.
        ranks_per_node: one number for all nodes (0 puts all on one), or one per node, which must add up to ``size``.
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
    """Role, group and place of every rank.

    Args:
        size: number of ranks, at least 1.
        symmetry_order: classes of the model, S.
        ranks_per_node: see :func:`nodes_by_count`; ignored where ``node_of_rank`` is given.
        node_of_rank: the node of each rank, any numbering (as MPI found it).
        coordinators: ``compute`` (every rank computes) or ``dedicated`` (only ranks with nobody below them).

    Raises:
        ValueError: fewer than one rank or class, an unknown ``coordinators``, node data that does not fit ``size``.
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
        """Number of groups G: the symmetry order, or fewer where there are not enough ranks."""
        return min(self.symmetry_order, self.size - 1)

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """Node of each rank, numbered from 0 in the order of their first rank."""
        assert self.node_of_rank is not None
        number: dict[int, int] = {}
        return tuple(number.setdefault(node, len(number)) for node in self.node_of_rank)

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return max(self.nodes) + 1

    @cached_property
    def ranks_of_node(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node."""
        found: list[list[int]] = [[] for _ in range(self.n_nodes)]
        for rank, node in enumerate(self.nodes):
            found[node].append(rank)
        return tuple(tuple(ranks) for ranks in found)

    @cached_property
    def leaves_of_node(self) -> tuple[int, ...]:
        """How many ranks of each node compute."""
        return tuple(sum(map(self.is_leaf, ranks)) for ranks in self.ranks_of_node)

    @property
    def layout(self) -> str:
        """Ranks, and ranks of each node: what a choice by time depends on."""
        counts = [len(ranks) for ranks in self.ranks_of_node]
        each = str(counts[0]) if len(set(counts)) == 1 else ",".join(map(str, counts))
        return f"{self.size} ranks, {each} a node"

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each group, its control rank first."""
        if self.n_groups == 0:
            return ()
        ordered = sorted(range(1, self.size), key=lambda rank: (self.nodes[rank], rank))
        bounds = block_bounds(self.size - 1, self.n_groups)
        return tuple(tuple(ordered[a:b]) for a, b in pairwise(bounds))

    @cached_property
    def control_ranks(self) -> tuple[int, ...]:
        """The control rank of each group."""
        return tuple(members[0] for members in self.groups)

    @cached_property
    def group_of_rank(self) -> tuple[int, ...]:
        """Group of each rank; -1 for the root, which is in none."""
        group = [-1] * self.size
        for index, members in enumerate(self.groups):
            for rank in members:
                group[rank] = index
        return tuple(group)

    @cached_property
    def group_of_class(self) -> NDArray[np.int64]:
        """(S,) group that each symmetry class belongs to; all zeros where there is only the root."""
        return np.arange(self.symmetry_order) % max(self.n_groups, 1)

    def role(self, rank: int) -> Role:
        """The role of ``rank``."""
        if rank == 0:
            return Role.ROOT
        return Role.CONTROL if self.groups[self.group_of_rank[rank]][0] == rank else Role.WORKER

    def is_leaf(self, rank: int) -> bool:
        """Whether ``rank`` computes gradients."""
        if self.coordinators == "compute" or self.size == 1:
            return True
        if rank == 0:
            return False
        members = self.groups[self.group_of_rank[rank]]
        return rank != members[0] or len(members) == 1

    @cached_property
    def bins(self) -> tuple[tuple[int, ...], ...]:
        """Leaves of each routing bin: one bin per group, and a last one for the root.

        The root's bin is empty where the root does not compute.
        """
        leaves = tuple(tuple(rank for rank in members if self.is_leaf(rank)) for members in self.groups)
        return (*leaves, (0,) if self.is_leaf(0) else ())

    @property
    def n_leaves(self) -> int:
        """Number of ranks that compute."""
        return sum(len(leaves) for leaves in self.bins)


def compute_slots(leaves: int, cores: int) -> int:
    """Ranks of a node that compute at the same time: few, so that each finds its memory in the caches.

    One for each core where that leaves few of them idle in the last round. Else so many more that the last round has a
    rank for each core too: of equal work, a round of fewer ranks takes as long. All of them where no other number will
    do.

    Args:
        leaves: of the node.
        cores: for them.
    """
    cores = max(cores, 1)
    if cores <= leaves and -leaves % cores <= IDLE * leaves:
        return cores
    for ranks in range(cores, leaves):
        if leaves % ranks == 0 or leaves % ranks >= cores:
            return ranks
    return max(leaves, 1)
