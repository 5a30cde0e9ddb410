"""This module routes sequences: it decides which leaf computes which sequence of a batch.

Routing decides which rank computes a result, never what the result is. The affinity of a sequence to a group is the
number of its tokens in the group's symmetry classes. Each group of ranks is a bin, and the root, which is in no group,
is one more.

- :func:`dominant` chooses the group with the most tokens in the sequence. With real text nearly all sequences then go
  to few groups.
- :func:`lift` chooses the group that is most over-represented against the frequencies of the corpus.
- :class:`Balanced` finds, exactly, the assignment of greatest total affinity with every bin within its capacity.

The option ``--hierarchy.routing my_module:ROUTING`` chooses a rule from outside, see :class:`RoutingRule`. Within a
bin, units go to the leaves in turn, so that the leaves of a bin differ by at most one unit.
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
    """A routing rule chooses bins: it is a function, or a class with callable instances, one for each run.

    An instance may also have ``learn(counts, capacity)``, which is called once before the first batch with some
    sequences of the corpus.
    """

    def __call__(
        self, counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
    ) -> NDArray[np.integer]:
        """Return the (n,) bin of each unit, which must depend on the arguments alone.

        Args:
            counts: (n, G + 1) The tokens of each group in each unit; the last column, the root's bin, is all zeros.
            capacity: (G + 1,) The units that an even share gives each bin, rounded up; it is 0 where no rank computes,
                and such a bin may not be chosen.
            frequency: (G,) The share of each group's tokens in the corpus.
        """


def dominant(
    counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
) -> NDArray[np.integer]:
    """Choose the group with the most tokens in each unit; :class:`RoutingRule` describes the arguments."""
    return counts[:, :-1].argmax(axis=1)


def lift(
    counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
) -> NDArray[np.integer]:
    """Choose the group that is most over-represented in each unit; :class:`RoutingRule` describes the arguments."""
    return (counts[:, :-1] / np.where(frequency > 0, frequency, 1.0)).argmax(axis=1)


class Balanced:
    """The rule that chooses the assignment of greatest total affinity with no bin above its capacity."""

    def __init__(self) -> None:
        self._prices: Integers | None = None

    def learn(self, counts: NDArray[np.int32], capacity: NDArray[np.int64]) -> None:
        """Find prices at which units like these choose their bins; the solver begins with them from now on.

        Where several assignments are equally good, the solver may then choose another one than before.
        """
        self._prices = clearing_prices(counts, capacity)

    def __call__(
        self, counts: NDArray[np.int32], capacity: NDArray[np.int64], frequency: NDArray[np.float64]
    ) -> NDArray[np.integer]:
        return assign(counts, capacity, self._prices)


class Router:
    """A router routes the batches of a run.

    Args:
        topology: The topology of the ranks.
        rule: The name of a rule, ``package.module:object``, or the rule itself.
        class_of_token: (V,) The symmetry class of each token id.
        frequencies: (V,) The number of times that each token id occurs in the corpus.
        unit_size: The number of consecutive sequences of a batch that are routed as one.

    Raises:
        PluginError: The rule is not callable.
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
        self.outside = ROUTINGS.called(found, rule)
        """How messages call a rule from outside the package; empty for one of the package's."""
        with plugin_errors(self.outside):
            self.rule = found() if isinstance(found, type) else found
        if not callable(self.rule):
            raise PluginError(f"{self.outside}: it is not a function of (counts, capacity, frequency)")
        self.unit_size = unit_size
        self.group_of_token = topology.group_of_class[class_of_token].astype(np.uint8)
        """(V,) The group of ranks of each token id."""
        self.n_bins = topology.n_groups + 1
        """The number of bins: the groups, and the root's own bin, to which no token belongs."""
        self._leaves = np.array([len(members) for members in topology.bins])
        self._ranks = np.array([rank for members in topology.bins for rank in members], np.int64)
        self._bounds = np.cumsum([0, *self._leaves])
        weight = np.bincount(self.group_of_token, weights=frequencies, minlength=max(topology.n_groups, 1))
        self.frequency = weight / max(weight.sum(), 1.0)
        """(G,) The share of each group's tokens in the corpus."""
        self.loads = np.zeros(topology.n_groups + 1, np.int64)
        """(G + 1,) The number of sequences that each bin has received so far."""
        self.tokens = 0
        """The number of tokens routed so far."""
        self.own_tokens = 0
        """The number of those tokens that were routed to the group of their own symmetry class."""
        self.learns = topology.size > 1 and callable(getattr(self.rule, "learn", None))
        """Whether :meth:`learn` may be called: the rule learns, and there are several ranks."""

    def learn(self, counts: NDArray[np.int32]) -> None:
        """Let the rule learn from the :meth:`counts` of one or more sequences like those to come."""
        units = self._units(counts)
        with plugin_errors(self.outside):
            self.rule.learn(read_only(units), read_only(self._capacity(len(units))))

    def route(self, tokens: NDArray[np.int32]) -> Dealt:
        """Return where the sequences of a batch of (B, T) token ids go; entries below 0 are padding."""
        return self.route_counts(self.counts(tokens))

    def route_counts(self, counts: NDArray[np.int32]) -> Dealt:
        """Return where sequences go by their (B, bins) :meth:`counts`."""
        n = len(counts)
        if self.topology.size == 1:
            total = int(counts.sum())
            return Dealt(np.zeros(n, np.int64), np.zeros(n, np.int64), total, total)
        units = self._units(counts)
        capacity = self._capacity(len(units))
        choose = self._from_outside if self.outside else self.rule
        return deal(counts, choose(units, capacity, self.frequency), self.unit_size, self._ranks, self._bounds)

    def record(self, dealt: Dealt) -> None:
        """Add the batch to :attr:`loads` and the counts of tokens; it must be called once per committed step."""
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
        """Return the (n, bins) counts of units: those of the sequences that are routed as one are added up."""
        if self.unit_size == 1:
            return counts
        return np.add.reduceat(counts, np.arange(0, len(counts), self.unit_size), axis=0)

    def _capacity(self, n: int) -> Integers:
        """Return the (bins,) units of ``n`` that each bin may hold: an even share for each leaf, rounded up."""
        return self._leaves * -(-n // len(self._ranks))


def even_leaves(n: int, topology: Topology) -> NDArray[np.int64]:
    """Return the (n,) leaf of each sequence in evaluation: they are divided evenly, whatever their tokens."""
    ranks = [rank for members in topology.bins for rank in members]
    bounds = np.array([n * i // len(ranks) for i in range(len(ranks) + 1)])
    return np.repeat(np.asarray(ranks, np.int64), np.diff(bounds))
