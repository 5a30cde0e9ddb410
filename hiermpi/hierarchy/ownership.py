"""This module decides which rank owns which part of the vector and holds the optimizer's state of it.

The vector is cut into blocks that cross neither a tensor nor a symmetry class of the token table
(:func:`hiermpi.optimizer.update.norm_blocks`). With placement ``root`` the root owns them all. With ``sharded`` the
control rank of a class owns that class's rows of the table, and everything else is divided among the control ranks, and
the root where it computes, so that all own about as much. This is what "12x locality" means here: the rows of a class
are written by one rank, a twelfth of the table each.

Owners are numbered as on the control communicator: 0 is the root, g + 1 is the control rank of group g.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.hierarchy.topology import Topology

FREE = -1
"""The mark of a block that belongs to no class, or to no rank of this node."""
SUMMED_ALONE = 1 << 20
"""The bytes of a node's gradients up to which spreading their sum over its ranks costs more than it saves."""


class Span(NamedTuple):
    """A span of the elements from ``start`` to ``stop`` of the vector, with their owner."""

    start: int
    stop: int
    owner: int


class Ownership:
    """The ownership has the owner of every block of the vector.

    Args:
        bounds: (n + 1,) The elements at which the blocks begin, and the size of the vector.
        owners: (n,) The number of each block's owner.
        classes: (n,) The symmetry class of each block, or :data:`FREE`.
        ranks: The world rank of every possible owner, by number.
    """

    def __init__(
        self, bounds: NDArray[np.int64], owners: NDArray[np.int64], classes: NDArray[np.int64], ranks: Sequence[int]
    ) -> None:
        self.bounds, self.owners, self.classes, self.ranks = bounds, owners, classes, tuple(ranks)

    @property
    def size(self) -> int:
        """Return the number of elements of the vector."""
        return int(self.bounds[-1])

    @cached_property
    def shared_out(self) -> bool:
        """Tell whether any rank but the root owns something."""
        return bool(self.owners.any())

    def number(self, rank: int) -> int | None:
        """Return the owner number of a rank that may own something, else None.

        The root has a number always, control ranks have one where parts are shared out.
        """
        owners = self.ranks if self.shared_out else self.ranks[:1]
        return owners.index(rank) if rank in owners else None

    @cached_property
    def spans(self) -> list[Span]:
        """Return the spans of the vector in order; a span is a run of blocks of one owner."""
        return spans_of(self.bounds, self.owners)

    def spans_of(self, owner: int) -> list[Span]:
        """Return the spans of one owner, in order."""
        return [span for span in self.spans if span.owner == owner]

    def blocks_of(self, owner: int) -> NDArray[np.int64]:
        """Return the indices of an owner's blocks."""
        return np.flatnonzero(self.owners == owner)


def spans_of(bounds: NDArray[np.int64], owners: NDArray[np.int64]) -> list[Span]:
    """Return the runs of blocks of one owner as spans, in order; blocks without an owner (below 0) are left out."""
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)] if len(owners) else [0]
    spans = [Span(int(bounds[first]), int(bounds[last]), int(owners[first])) for first, last in pairwise(edges)]
    return [span for span in spans if span.owner >= 0]


def owned_by_root(size: int) -> Ownership:
    """Make the ownership of a vector of ``size`` elements (at least 1) that the root owns, in blocks of cache lines."""
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
    """Return the owner of each block under ``placement``.

    Args:
        bounds: (n + 1,) The elements at which the blocks begin, and the size of the vector.
        classes: (n,) The symmetry class of each block, or :data:`FREE`.
        topology: The topology of the ranks.
        placement: The value of ``optimizer.placement``, ``root`` or ``sharded``.
        together: (n,) A number for each block of a tensor that one owner must hold whole, the same for all of its
            blocks, and :data:`FREE` for other blocks. By default there is no such tensor.
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
    """Return the (n,) member that gets each block.

    Free blocks are divided in contiguous runs so that all members have about as many elements.

    Args:
        sizes: (n,) The elements of each block.
        fixed: (n,) The member that must get the block, or :data:`FREE`.
        members: The members among which free blocks are divided, in the order of their runs; fixed members need not be
            among them.
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
    """Fix one owner for all blocks of each tensor that must be whole.

    The largest tensors come first, and each goes to the member with the fewest elements so far.

    Args:
        sizes: (n,) The elements of each block.
        together: (n,) The number of the block's whole tensor or :data:`FREE`, see :func:`assign`.
        fixed: (n,) The member that must get the block or :data:`FREE`, written for the blocks of whole tensors.
        members: The members among which the tensors are divided.
    """
    fixed[together >= 0] = FREE
    loads = {member: int(sizes[fixed == member].sum()) for member in members}
    tensors = np.unique(together[together >= 0])
    for tensor in sorted(tensors, key=lambda tensor: -int(sizes[together == tensor].sum())):
        lightest = min(members, key=lambda member: loads[member])
        fixed[together == tensor] = lightest
        loads[lightest] += int(sizes[together == tensor].sum())


def water_filled(loads: NDArray[np.float64], more: float) -> NDArray[np.float64]:
    """Return the (n,) shares of ``more`` that raise the smallest of the (n,) ``loads`` to one level."""
    ordered = np.sort(loads)
    # Where the k smallest loads rise, the level is the mean of their loads and of ``more`` spread over them.
    levels = (np.cumsum(ordered) + more) / np.arange(1, len(loads) + 1)
    level = levels[np.flatnonzero(levels >= ordered)[-1]]
    return np.maximum(level - loads, 0.0)


def owners_here(ownership: Ownership, topology: Topology, node: int) -> NDArray[np.int64]:
    """Return the (n,) owner of each block by its rank within ``node``; it is :data:`FREE` on other nodes."""
    place = {rank: index for index, rank in enumerate(topology.ranks_of_node[node])}
    return np.array([place.get(rank, FREE) for rank in ownership.ranks])[ownership.owners]


def summing(ownership: Ownership, topology: Topology, node: int, width: int, cores: int) -> NDArray[np.int64]:
    """Return the (n,) rank within ``node`` that sums each block over the gradients of the node.

    On one node the owners sum what they own, where they are as many as the cores, or where there is so little that
    spreading the sum costs more than it saves. Otherwise all ranks take part, see :func:`node_sums`.

    Args:
        ownership: The owners of the vector.
        topology: The topology of the ranks.
        node: The number of the node.
        width: The bytes of an element of the gradients.
        cores: The number of cores of a node.
    """
    if topology.n_nodes == 1:
        owners = owners_here(ownership, topology, node)
        if width * ownership.size * topology.n_leaves <= SUMMED_ALONE or len({0, *owners.tolist()}) >= cores:
            return owners
    return node_sums(ownership, topology, node)


def node_sums(ownership: Ownership, topology: Topology, node: int) -> NDArray[np.int64]:
    """Return the (n,) rank within ``node`` that sums each block, where all ranks of the node take part.

    Owners of table rows sum those rows themselves; everything else is divided among all ranks of the node but a root
    that only coordinates.

    Args:
        ownership: The owners of the vector.
        topology: The topology of the ranks.
        node: The number of the node.
    """
    here = topology.ranks_of_node[node]
    owner_here = owners_here(ownership, topology, node)
    fixed = np.where((ownership.classes >= 0) & ownership.shared_out, owner_here, FREE)
    members = [index for index, rank in enumerate(here) if rank or topology.is_leaf(0) or len(here) == 1]
    return dealt_out(np.diff(ownership.bounds), fixed, members)


def lanes(ownership: Ownership, topology: Topology) -> list[list[Span]]:
    """Return the spans of the vector's parts (lanes), one part for each rank of the smallest node.

    The parts are about equal, and a span's ``owner`` is a node here. The k-th ranks of all nodes carry part k between
    the nodes: gradient sums to the node of their owner, parameters from there.
    """
    node_of = np.array([topology.nodes[rank] for rank in ownership.ranks])[ownership.owners]
    sizes = np.diff(ownership.bounds)
    lane = np.empty(len(sizes), np.int64)
    n_lanes = min(len(ranks) for ranks in topology.ranks_of_node)
    for node in np.unique(node_of):
        blocks = np.flatnonzero(node_of == node)
        lane[blocks] = dealt_out(sizes[blocks], np.full(len(blocks), FREE), range(n_lanes))
    return [spans_of(ownership.bounds, np.where(lane == k, node_of, FREE)) for k in range(n_lanes)]
