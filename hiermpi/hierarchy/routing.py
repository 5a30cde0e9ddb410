"""Routing: which leaf computes which sequence of a batch.

It decides *who computes*, never *what is computed*. The affinity of a sequence to a group is the number of its tokens
in the group's symmetry classes. Groups of ranks are bins here, and the root, which is in no group, is one more.

- :func:`dominant`: the group with the most tokens in the sequence (the original's rule). Real text collapses under it.
- :func:`lift`: the group most over-represented against the corpus' own frequencies.
- :class:`Balanced`: the assignment of greatest total affinity with every bin within its capacity, found exactly.

A rule of one's own is a function like these two (see :class:`RoutingRule`), chosen with
``--hierarchy.routing my_module:ROUTING``. Within a bin, units go to the leaves in turn, so that leaves of a bin differ
by at most one unit.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import ROUTINGS
from hiermpi.errors import PluginError, plugin_errors
from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels.assignment import Integers, assign, clearing_prices
from hiermpi.kernels.loops import Dealt, count_groups, deal
from hiermpi.kernels.memory import read_only


class RoutingRule(Protocol):
    """A way to choose bins: a function, or a class whose instances are such functions, one for each run.

    An instance may also have ``learn(counts, capacity)``, which is called once before the first batch with some
    sequences of the corpus.
    """

    def __call__(
        self, counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
    ) -> NDArray[np.integer]:
        """Return the (n,) bin of each unit, a pure function of the arguments.

        Args:
            counts: (n, G + 1) tokens of each group in each unit; the last column is the root's own bin, all zeros.
            capacity: (G + 1,) units that an even share gives each bin, rounded up; 0 where nobody computes, and such a
                bin may not be chosen.
            frequency: (G,) share of each group's tokens in the corpus.
        """


def dominant(
    counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
) -> NDArray[np.integer]:
    """Choose the group with the most tokens in the unit."""
    return counts[:, :-1].argmax(axis=1)


def lift(
    counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
) -> NDArray[np.integer]:
    """Choose the group that is most over-represented in the unit against the corpus."""
    return (counts[:, :-1] / np.where(frequency > 0, frequency, 1.0)).argmax(axis=1)


class Balanced:
    """Chooses the assignment of greatest total affinity with no bin above its capacity."""

    def __init__(self) -> None:
        self._prices: Integers | None = None

    def learn(self, counts: NDArray[np.int32], capacity: NDArray[np.int64]) -> None:
        """Find prices at which sequences like these choose their bins: the solver then begins there.

        Of assignments that are equally good, it may choose another one from then on.
        """
        self._prices = clearing_prices(counts, capacity)

    def __call__(
        self, counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
    ) -> NDArray[np.integer]:
        return assign(counts, capacity, self._prices)


class Router:
    """Routes batches for one topology.

    Args:
        topology: The ranks.
        rule: The name of a rule, ``package.module:object``, or the rule itself.
        class_of_token: (V,) symmetry class of each token id.
        frequencies: (V,) corpus frequency of each token id.
        unit_size: Sequences, by position in the batch, that are routed as one.
    """

    def __init__(
        self,
        topology: Topology,
        rule: Any,
        class_of_token: NDArray[np.uint8],
        frequencies: NDArray[np.integer],
        unit_size: int = 1,
    ) -> None:
        self.topology = topology
        found = ROUTINGS.load(rule) if isinstance(rule, str) else rule
        name = ROUTINGS.called(found, rule)
        self.outside = f"hierarchy.routing = {name}" if name else ""
        """How messages call a rule from outside the package; empty for one of the package's."""
        with plugin_errors(self.outside):
            self.rule = found() if isinstance(found, type) else found
        if not callable(self.rule):
            raise PluginError(f"{self.outside}: it is not a function of (counts, capacity, frequency)")
        self.unit_size = unit_size
        self.group_of_token = topology.group_of_class[class_of_token].astype(np.uint8)
        """(V,) group of ranks of each token id."""
        self.n_bins = topology.n_groups + 1
        """Bins: the groups, and the root's own, which no token belongs to."""
        self._leaves = np.array([len(members) for members in topology.bins])
        self._ranks = np.array([rank for members in topology.bins for rank in members], np.int64)
        self._bounds = np.cumsum([0, *self._leaves])
        weight = np.bincount(self.group_of_token, weights=frequencies, minlength=max(topology.n_groups, 1))
        self.frequency = weight / max(weight.sum(), 1.0)
        """(G,) share of each group's tokens in the corpus."""
        self.loads = np.zeros(topology.n_groups + 1, np.int64)
        """Sequences that each bin has received so far."""
        self.tokens = 0
        self.own_tokens = 0
        """Tokens routed so far, and those of them that met the group of their own symmetry class."""
        self.learns = topology.size > 1 and callable(getattr(self.rule, "learn", None))
        """Whether :meth:`learn` is of use."""

    def learn(self, counts: NDArray[np.int32]) -> None:
        """Let the rule look at the :meth:`counts` of some sequences like those to come, one or more."""
        units = self._units(counts)
        with plugin_errors(self.outside):
            self.rule.learn(read_only(units), read_only(self._capacity(len(units))))

    def route(self, tokens: NDArray[np.int32]) -> Dealt:
        """Route the (B, T) token ids of one batch; entries below 0 are padding."""
        return self.route_counts(self.counts(tokens))

    def route_counts(self, counts: NDArray[np.int32]) -> Dealt:
        """Route sequences by their (B, bins) :meth:`counts`."""
        n = len(counts)
        if self.topology.size == 1:
            total = int(counts.sum())
            return Dealt(np.zeros(n, np.int64), np.zeros(n, np.int64), total, total)
        units = self._units(counts)
        capacity = self._capacity(len(units))
        choose = self._from_outside if self.outside else self.rule
        return deal(counts, choose(units, capacity, self.frequency), self.unit_size, self._ranks, self._bounds)

    def record(self, dealt: Dealt) -> None:
        """Count the batch into :attr:`loads`; called once per committed step."""
        self.loads += np.bincount(dealt.bin, minlength=len(self.loads))
        self.tokens += dealt.tokens
        self.own_tokens += dealt.own_tokens

    def affinity(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the (B, G) number of tokens of each group in each sequence."""
        return self.counts(tokens)[:, :-1]

    def counts(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the (B, G + 1) number of tokens of each bin in each sequence; the root's bin has none."""
        return count_groups(tokens, self.group_of_token, self.n_bins)

    def _from_outside(
        self, counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Ask a rule from outside; what it raises or breaks is told in one sentence that names it."""
        with plugin_errors(self.outside):
            found = np.asarray(self.rule(read_only(counts), read_only(capacity), read_only(frequency)))
        n = len(counts)
        if found.shape != (n,) or found.dtype.kind not in "iu":
            raise PluginError(
                f"{self.outside}: expected the bin of each of {n} units as integers ({n},), not "
                f"{found.dtype} {found.shape}"
            )
        allowed = np.flatnonzero(capacity)
        wrong = ~np.isin(found, allowed)
        if wrong.any():
            raise PluginError(
                f"{self.outside}: it chose bin {found[wrong.argmax()]} for unit {wrong.argmax()}: "
                f"expected one of {', '.join(map(str, allowed))}, the bins with a capacity"
            )
        return found.astype(np.int64)

    def _units(self, counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """Add up the counts of sequences that are routed as one."""
        if self.unit_size == 1:
            return counts
        return np.add.reduceat(counts, np.arange(0, len(counts), self.unit_size), axis=0)

    def _capacity(self, n: int) -> Integers:
        """Return the (bins,) units of ``n`` that each bin may hold: an even share a leaf, rounded up."""
        return self._leaves * -(-n // len(self._ranks))


def even_leaves(n: int, topology: Topology) -> NDArray[np.int64]:
    """Return the (n,) leaf of each sequence when they are dealt out evenly, whatever their tokens (evaluation)."""
    ranks = [rank for members in topology.bins for rank in members]
    bounds = np.array([n * i // len(ranks) for i in range(len(ranks) + 1)])
    return np.repeat(np.asarray(ranks, np.int64), np.diff(bounds))
