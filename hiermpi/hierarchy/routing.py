"""Routing: which leaf computes which sequence of a batch.

It decides *who computes*, never *what is computed*. The affinity of a sequence to a group is the number of its
tokens in the group's symmetry classes.

- ``dominant``: the group with the most tokens in the sequence (the original's rule). Real text collapses under it.
- ``lift``: the group most over-represented against the corpus' own frequencies.
- ``balanced``: the assignment of greatest total affinity with every group within its capacity, found exactly.

Within a bin, units go to the leaves in turn, so that leaves of a bin differ by at most one unit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels.assignment import Integers, assign, clearing_prices
from hiermpi.kernels.loops import compiled_loops
from hiermpi.kernels.memory import address_of


class Routing(NamedTuple):
    """Where the sequences of one batch go."""

    leaf: NDArray[np.int64]
    """(B,) rank that computes each sequence."""
    bin: NDArray[np.int64]
    """(B,) group of each sequence; G for the root's own bin."""
    tokens: int
    """Tokens in the batch."""
    own_tokens: int
    """Those that are computed in the group of their own symmetry class."""


class Router:
    """Routes batches for one topology.

    Args:
        topology: the ranks.
        mode: ``balanced``, ``dominant`` or ``lift``.
        group_of_token: (V,) symmetry class of each token id.
        counts: (V,) corpus frequency of each token id (used by ``lift``).
        unit_size: sequences, by position in the batch, that are routed as one.
    """

    def __init__(
        self,
        topology: Topology,
        mode: str,
        group_of_token: NDArray[np.uint8],
        counts: NDArray[np.integer],
        unit_size: int = 1,
    ) -> None:
        self.topology = topology
        self.mode = mode
        self.unit_size = unit_size
        self.group_of_token = topology.group_of_class[group_of_token].astype(np.uint8)
        self.n_bins = topology.n_groups + 1
        """Of the counts: the groups, and the root's bin, which no token belongs to."""
        self._leaves = np.array([len(members) for members in topology.bins])
        self._ranks = np.array([rank for members in topology.bins for rank in members], np.int64)
        self._bounds = np.cumsum([0, *self._leaves])
        weight = np.bincount(self.group_of_token, weights=counts, minlength=max(topology.n_groups, 1))
        self.frequency = weight / max(weight.sum(), 1.0)
        self.loads = np.zeros(topology.n_groups + 1, np.int64)
        """Sequences that each bin has received so far."""
        self.tokens = 0
        self.own_tokens = 0
        """Tokens routed so far, and those of them that met the group of their own symmetry class."""
        self.learns = mode == "balanced" and topology.size > 1
        """Whether :meth:`learn` is of use."""
        self._prices: Integers | None = None

    def learn(self, counts: NDArray[np.int32]) -> None:
        """Look at the :meth:`counts` of some sequences like those to come, one or more: it makes routing faster.

        Of assignments that are equally good, it may choose another one from then on.
        """
        units = self._units(counts)
        self._prices = clearing_prices(units, self._capacity(len(units)))

    def route(self, tokens: NDArray[np.int32]) -> Routing:
        """Route the (B, T) token ids of one batch; entries below 0 are padding."""
        return self.route_counts(self.counts(tokens))

    def route_counts(self, counts: NDArray[np.int32]) -> Routing:
        """Route sequences by their (B, bins) :meth:`counts`."""
        n, unit = len(counts), self.unit_size
        if self.topology.size == 1:
            total = int(counts.sum())
            return Routing(np.zeros(n, np.int64), np.zeros(n, np.int64), total, total)
        unit_bin = self._bins(self._units(counts))
        loops = compiled_loops()
        if loops is not None:
            leaf, bins, totals = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(2, np.int64)
            unit_bin = np.ascontiguousarray(unit_bin, np.int64)
            counts = np.ascontiguousarray(counts, np.int32)
            arrays = (leaf, bins, totals, counts, unit_bin, self._ranks, self._bounds, np.empty(self.n_bins, np.int64))
            loops.deal(*(address_of(array) for array in arrays), n, unit, self.n_bins)
            return Routing(leaf, bins, int(totals[0]), int(totals[1]))
        unit_of = np.arange(n) // unit
        chosen = unit_bin[unit_of]
        own = counts[np.arange(n), chosen]
        return Routing(leaves_in_turn(unit_bin, self.topology.bins)[unit_of], chosen, int(counts.sum()), int(own.sum()))

    def record(self, routing: Routing) -> None:
        """Count the batch into :attr:`loads`: called once per committed step."""
        self.loads += np.bincount(routing.bin, minlength=len(self.loads))
        self.tokens += routing.tokens
        self.own_tokens += routing.own_tokens

    def affinity(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """(B, G) number of tokens of each group in each sequence."""
        return self.counts(tokens)[:, :-1]

    def counts(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """(B, G + 1) the same, and the root's bin."""
        n, bins = len(tokens), self.n_bins
        loops = compiled_loops()
        if loops is not None and tokens.dtype == np.int32 and tokens.strides[1:] == (4,):
            counts = np.zeros((n, bins), np.int32)
            arrays = (counts, tokens, self.group_of_token)
            loops.count_groups(*(address_of(array) for array in arrays), n, tokens.shape[1], tokens.strides[0] // 4, bins)
            return counts
        cell = bins * np.arange(n)[:, None] + self.group_of_token[tokens]  # of padding some token's, taken out below
        present = tokens >= 0
        counted = cell.reshape(-1) if present.all() else cell[present]
        return np.bincount(counted, minlength=n * bins).astype(np.int32).reshape(n, bins)

    def _bins(self, counts: NDArray[np.int32]) -> NDArray[np.int64]:
        """(n,) bin of each unit."""
        if self.mode == "dominant":
            return counts[:, :-1].argmax(axis=1)
        if self.mode == "lift":
            expected = np.where(self.frequency > 0, self.frequency, 1.0)
            return (counts[:, :-1] / expected).argmax(axis=1)
        return assign(counts, self._capacity(len(counts)), self._prices)

    def _units(self, counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """The counts of sequences, added up over those that are routed as one."""
        if self.unit_size == 1:
            return counts
        return np.add.reduceat(counts, np.arange(0, len(counts), self.unit_size), axis=0)

    def _capacity(self, n: int) -> Integers:
        """(bins,) units of ``n`` that each bin may hold: an even share for each of its leaves, rounded up."""
        return self._leaves * -(-n // len(self._ranks))


def leaves_in_turn(bins: NDArray[np.integer], leaves: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Leaf of each unit: the units of a bin go to its leaves in turn, in the order of the batch.

    Args:
        bins: (n,) bin of each unit.
        leaves: ranks of each bin.
    """
    leaf = np.empty(len(bins), np.int64)
    for index, members in enumerate(leaves):
        mine = np.flatnonzero(bins == index)
        if len(mine):
            leaf[mine] = np.asarray(members)[np.arange(len(mine)) % len(members)]
    return leaf


def even_leaves(n: int, topology: Topology) -> NDArray[np.int64]:
    """(n,) leaf of each sequence when they are dealt out evenly, whatever their tokens (evaluation)."""
    ranks = [rank for members in topology.bins for rank in members]
    bounds = np.array([n * i // len(ranks) for i in range(len(ranks) + 1)])
    return np.repeat(np.asarray(ranks, np.int64), np.diff(bounds))
