"""Who holds the optimizer's state of which part of the vector.

The vector is cut into blocks that cross neither a tensor nor a symmetry class of the token table
(:mod:`hiermpi.optimizer.norm`). With placement ``root`` the root owns them all. With ``sharded`` the control rank of a
class owns that class's rows of the table, and everything else is dealt out among the control ranks, and the root where
it computes, so that all own about as much. This is what "12x locality" means here: rows of a class are written by
one rank, a twelfth of the table each.

Owners are numbered as on the control communicator: 0 is the root, g + 1 the control rank of group g.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.hierarchy.topology import Topology

FREE = -1
"""Of a block that belongs to no class, or to nobody here."""
SUMMED_ALONE = 1 << 20
"""Bytes of a node's gradients up to which spreading their sum costs more than it saves."""


class Span(NamedTuple):
    """Elements ``start`` to ``stop`` of the vector, and whose they are."""

    start: int
    stop: int
    owner: int


class Ownership:
    """The owner of every block.

    Args:
        bounds: (n + 1,) at which the blocks begin, and the size of the vector.
        owners: (n,) number of each block's owner.
        classes: (n,) symmetry class of each block, or :data:`FREE`.
        ranks: world rank of every possible owner, by number.
    """

    def __init__(
        self, bounds: NDArray[np.int64], owners: NDArray[np.int64], classes: NDArray[np.int64], ranks: Sequence[int]
    ) -> None:
        self.bounds, self.owners, self.classes, self.ranks = bounds, owners, classes, tuple(ranks)

    @property
    def size(self) -> int:
        """Elements of the vector."""
        return int(self.bounds[-1])

    @cached_property
    def shared_out(self) -> bool:
        """Whether anybody but the root owns something."""
        return bool(self.owners.any())

    def number(self, rank: int) -> int | None:
        """The number of the root and, where parts are shared out, of any control rank; None of all others."""
        owners = self.ranks if self.shared_out else self.ranks[:1]
        return owners.index(rank) if rank in owners else None

    @cached_property
    def spans(self) -> list[Span]:
        """The vector in runs of blocks of one owner, in order."""
        return spans_of(self.bounds, self.owners)

    def spans_of(self, owner: int) -> list[Span]:
        """What an owner has, in runs of blocks."""
        return [span for span in self.spans if span.owner == owner]

    def blocks_of(self, owner: int) -> NDArray[np.int64]:
        """Indices of an owner's blocks."""
        return np.flatnonzero(self.owners == owner)


def spans_of(bounds: NDArray[np.int64], owners: NDArray[np.int64]) -> list[Span]:
    """Runs of blocks of one owner, in order; blocks of nobody (below 0) are left out."""
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)] if len(owners) else [0]
    spans = [Span(int(bounds[first]), int(bounds[last]), int(owners[first])) for first, last in pairwise(edges)]
    return [span for span in spans if span.owner >= 0]


def owned_by_root(size: int) -> Ownership:
    """All of a vector of ``size`` elements (at least 1) at the root, in blocks of whole cache lines."""
    unit = min(max(size // 1024 // 16 * 16, 16), 4096)
    bounds = np.append(np.arange(0, size, unit), size)
    n = len(bounds) - 1
    return Ownership(bounds, np.zeros(n, np.int64), np.full(n, FREE), [0])


def assign(
    bounds: NDArray[np.int64],
    classes: NDArray[np.int64],
    topology: Topology,
    placement: str,
    together: NDArray[np.int64] | None = None,
) -> Ownership:
    """Give each block its owner under ``placement``.

    Args:
        bounds: See :class:`Ownership`.
        classes: See :class:`Ownership`.
        topology: The ranks.
        placement: ``root`` or ``sharded``.
        together: (n,) a number for each block of a tensor that one owner must hold whole, the same for all of its
            blocks;
            :data:`FREE` for other blocks. By default there is no such tensor.
    """
    ranks = [0, *topology.control_ranks]
    if placement == "root" or len(ranks) == 1:
        return Ownership(bounds, np.zeros(len(classes), np.int64), classes, ranks)
    fixed = np.where(classes < 0, FREE, topology.group_of_class[np.maximum(classes, 0)] + 1)
    members = [number for number in range(len(ranks)) if number or topology.is_leaf(0)]
    if together is not None:
        keep_together(np.diff(bounds), together, fixed, members)
    return Ownership(bounds, dealt_out(np.diff(bounds), fixed, members), classes, ranks)


def dealt_out(sizes: NDArray[np.int64], fixed: NDArray[np.int64], members: Sequence[int]) -> NDArray[np.int64]:
    """(n,) a member for each block: the fixed one, or such that all have about as much, in contiguous runs.

    Args:
        sizes: (n,) elements of each block.
        fixed: (n,) a member, or :data:`FREE`.
        members: who takes part in the dealing, in the order of their runs; fixed ones need not be among them.
    """
    owners, free = fixed.copy(), np.flatnonzero(fixed == FREE)
    loads = np.array([sizes[fixed == member].sum() for member in members], np.float64)
    ends = np.cumsum(water_filled(loads, float(sizes[free].sum())))
    middles = np.cumsum(sizes[free]) - sizes[free] / 2
    owners[free] = np.asarray(members)[np.minimum(np.searchsorted(ends, middles, side="right"), len(members) - 1)]
    return owners


def keep_together(
    sizes: NDArray[np.int64], together: NDArray[np.int64], fixed: NDArray[np.int64], members: Sequence[int]
) -> None:
    """Fix an owner for all blocks of each whole tensor: the largest first, each to the member with the least so far.

    Args:
        sizes: (n,) elements of each block.
        together: (n,) see :func:`assign`.
        fixed: (n,) a member or :data:`FREE`, written where a block is of a whole tensor.
        members: Who takes part in the dealing.
    """
    fixed[together >= 0] = FREE
    loads = {member: int(sizes[fixed == member].sum()) for member in members}
    tensors = np.unique(together[together >= 0])
    for tensor in sorted(tensors, key=lambda tensor: -int(sizes[together == tensor].sum())):
        lightest = min(members, key=lambda member: loads[member])
        fixed[together == tensor] = lightest
        loads[lightest] += int(sizes[together == tensor].sum())


def water_filled(loads: NDArray[np.float64], more: float) -> NDArray[np.float64]:
    """What each gets of ``more`` so that the smallest loads rise to one level."""
    ordered = np.sort(loads)
    # With the k smallest under water the level is their mean load plus what each gets of the rest.
    levels = (np.cumsum(ordered) + more) / np.arange(1, len(loads) + 1)
    level = levels[np.flatnonzero(levels >= ordered)[-1]]
    return np.maximum(level - loads, 0.0)


def owners_here(ownership: Ownership, topology: Topology, node: int) -> NDArray[np.int64]:
    """(n,) the owner of each block, by its place on ``node``; :data:`FREE` where it is elsewhere."""
    place = {rank: index for index, rank in enumerate(topology.ranks_of_node[node])}
    return np.array([place.get(rank, FREE) for rank in ownership.ranks])[ownership.owners]


def summing(ownership: Ownership, topology: Topology, node: int, width: int, cores: int) -> NDArray[np.int64]:
    """(n,) the rank on ``node``, by its place there, that sums each block over the gradients of the node.

    On one node the owners sum what they own, where they are as many as the cores, or where there is so little that
    spreading the sum costs more than it saves. Elsewhere all take part: :func:`node_sums`.

    Args:
        ownership: of the vector.
        topology: the ranks.
        node: by number.
        width: bytes of an element of the gradients.
        cores: of a node.
    """
    if topology.n_nodes == 1:
        owners = owners_here(ownership, topology, node)
        if width * ownership.size * topology.n_leaves <= SUMMED_ALONE or len({0, *owners.tolist()}) >= cores:
            return owners
    return node_sums(ownership, topology, node)


def node_sums(ownership: Ownership, topology: Topology, node: int) -> NDArray[np.int64]:
    """(n,) as :func:`summing`, by all ranks of the node.

    Owners of table rows sum those themselves; everything else is dealt out among all ranks there but a root that
    only coordinates.
    """
    here = topology.ranks_of_node[node]
    owner_here = owners_here(ownership, topology, node)
    fixed = np.where((ownership.classes >= 0) & ownership.shared_out, owner_here, FREE)
    members = [index for index, rank in enumerate(here) if rank or topology.is_leaf(0) or len(here) == 1]
    return dealt_out(np.diff(ownership.bounds), fixed, members)


def lanes(ownership: Ownership, topology: Topology) -> list[list[Span]]:
    """The vector cut into as many equal parts as the smallest node has ranks; here a span's ``owner`` is a node.

    The ranks at place k of every node carry part k between the nodes: gradient sums to the node of their owner,
    parameters from there.
    """
    node_of = np.array([topology.nodes[rank] for rank in ownership.ranks])[ownership.owners]
    sizes = np.diff(ownership.bounds)
    lane = np.empty(len(sizes), np.int64)
    n_lanes = min(len(ranks) for ranks in topology.ranks_of_node)
    for node in np.unique(node_of):
        blocks = np.flatnonzero(node_of == node)
        lane[blocks] = dealt_out(sizes[blocks], np.full(len(blocks), FREE), range(n_lanes))
    return [spans_of(ownership.bounds, np.where(lane == k, node_of, FREE)) for k in range(n_lanes)]
