"""This module assigns units to a few bins with capacities, exactly: the transportation problem of routing.

Capacity beyond the number of units is taken by idle units, which are all alike and have no affinity, so that every bin
is exactly full in the end. The method is that of successive shortest paths (Ahuja, Magnanti and Orlin,
Network Flows, 1993, sections 9.3 and 9.7):

1. Given any prices, each unit takes the bin of its greatest ``affinity - price``. By complementary slackness
   this is optimal for the loads that it happens to give: no cycle of moves between bins gains anything.
2. While a bin is too full, units move along a shortest path from such a bin to one with room; the edge from
   bin i to bin j is the least loss of affinity for which a unit now in i moves to j. A shortest path leaves
   no cycle that gains. Once all loads fit, the absence of such cycles is the optimality of the assignment.

So the prices decide only how many paths are needed. The caller may know them from units of the same kind
(:func:`clearing_prices`); else, where there are many units, they come from a sample, which is solved in the same way,
and a round of coordinate descent on the dual. All of it is integer arithmetic without randomness. The steps that follow
the choice of prices are also compiled (loops.c), with the same result.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels import loops
from hiermpi.kernels.memory import address_of

Integers = NDArray[np.int64]

SAMPLING = 4
"""The number of units for each one in the sample from which prices come."""
FEW = 256
"""The number of units up to which moving them all is faster than finding prices first, where step 2 is compiled."""
FITTING = 1 << 31
"""The bound below which affinities fit the int32 of the compiled form, which checks its own bound besides."""
NEVER = 1 << 60
"""The loss of a move that does not exist; the sum of two is still an int64."""


def assign(
    affinity: NDArray[np.integer], capacity: Integers, prices: Integers | None = None
) -> NDArray[np.intp]:
    """Return the assignment that maximises the total affinity with no bin above its capacity.

    Args:
        affinity: (n, bins) The affinity of each unit to each bin (in tokens), integers of at least 0.
        capacity: (bins,) The units that each bin may hold, integers of at least 0.
        prices: (bins,) The prices to begin with, from :func:`clearing_prices`; by default they are found.

    Returns:
        (n,) The bin of each unit, a pure function of the arguments.

    Raises:
        ValueError: The capacities do not hold all units.
    """
    n = len(affinity)
    room = int(capacity.sum())
    if room < n:
        raise ValueError(f"{n} units do not fit into a capacity of {room}")
    if n == 0:
        return np.zeros(0, np.intp)
    capacity = np.minimum(capacity, n)
    if prices is None and n > FEW:
        return _solve(affinity, capacity).place
    first = np.zeros(len(capacity), np.int64) if prices is None else np.ascontiguousarray(prices, np.int64)
    place, load, idle = np.empty(n, np.int64), *np.empty((2, len(capacity)), np.int64)
    if _balance_compiled(affinity, capacity, place, load, idle, first) is not None:
        return place
    return (_solve(affinity, capacity) if prices is None else _balanced(affinity, capacity, first)).place


def clearing_prices(affinity: NDArray[np.integer], capacity: Integers) -> Integers:
    """Return (bins,) prices at which each unit prefers a bin that :func:`assign` gives it for the same arguments."""
    return _solve(affinity, np.minimum(capacity, len(affinity))).prices()


def _balance_compiled(
    affinity: NDArray[np.integer],
    capacity: Integers,
    place: Integers,
    load: Integers,
    idle: Integers,
    prices: Integers | None = None,
) -> Integers | None:
    """Do what :meth:`_Assignment.balance` does in compiled code; return the losses, or None where that is impossible.

    Args:
        affinity: (n, bins) The affinity of each unit to each bin.
        capacity: (bins,) The units that each bin may hold.
        place: (n,) The bin of each unit, changed in place.
        load: (bins,) The units in each bin, changed in place.
        idle: (bins,) The idle units in each bin, changed in place.
        prices: (bins,) Prices by which ``place``, ``load`` and ``idle`` are chosen first; None keeps what they are.
    """
    library = loops.compiled_loops()
    if library is None or (affinity.dtype != np.int32 and affinity.max() >= FITTING):
        return None
    n, bins = affinity.shape
    loss = np.empty((bins, bins), np.int64)
    affinity, capacity = np.ascontiguousarray(affinity, np.int32), np.ascontiguousarray(capacity, np.int64)
    arrays = (affinity, capacity, prices, place, load, idle, loss)
    addresses = [None if array is None else address_of(array) for array in arrays]
    return loss if library.balance(*addresses, n, bins) else None


def _solve(affinity: NDArray[np.integer], capacity: Integers) -> "_Assignment":
    """Return the best assignment of one unit or more; arguments are as in :func:`assign`, no capacity above n."""
    n, bins = affinity.shape
    prices = np.zeros(bins, np.int64)
    size = n // SAMPLING
    if size > 0 and (n > FEW or loops.compiled_loops() is None):
        # Steps of the golden ratio: an even sample, which no period in the order of the units can bias.
        sample = np.arange(size) * 2654435769 % 2**32 * n >> 32
        share = np.diff(capacity.cumsum() * size // n, prepend=0)
        prices = _solve(affinity[sample], share).prices()
        _descend(affinity, capacity, prices)
    return _balanced(affinity, capacity, prices)


def _balanced(affinity: NDArray[np.integer], capacity: Integers, prices: Integers) -> "_Assignment":
    """Return the best assignment, found from these prices; the arguments are those of :func:`assign`."""
    assignment = _Assignment(affinity, capacity, prices)
    assignment.balance()
    return assignment


def _descend(affinity: NDArray[np.integer], capacity: Integers, prices: Integers) -> None:
    """Set each of the prices in turn so that as many units prefer its bin as the bin may hold.

    Args:
        affinity: (n, bins) The affinity of each unit to each bin.
        capacity: (bins,) The units that each bin may hold.
        prices: (bins,) The prices, changed in place.
    """
    n, bins = affinity.shape
    idle = int(capacity.sum()) - n
    net = affinity - prices
    for bin_ in range(bins):
        if 0 < capacity[bin_] < n:
            net[:, bin_] = -NEVER
            margin = affinity[:, bin_] - net.max(axis=1)
            idle_margin = int(np.delete(prices, bin_).min())
            prices[bin_] = _clearing_price(margin, int(capacity[bin_]), idle, idle_margin)
            net[:, bin_] = affinity[:, bin_] - prices[bin_]


def _clearing_price(margin: Integers, capacity: int, idle: int, idle_margin: int) -> int:
    """Return the price of a bin: the ``capacity``-th largest of all margins, those of idle units included.

    Args:
        margin: (n,) The price at which each unit is indifferent to the bin.
        capacity: The units that the bin may hold.
        idle: The number of idle units.
        idle_margin: The margin of each idle unit.
    """
    lowest = len(margin) - capacity
    if idle >= capacity:
        return max(idle_margin, int(np.partition(margin, lowest)[lowest]))
    highest = lowest + idle
    ordered = np.partition(margin, (lowest, highest))
    return min(max(idle_margin, int(ordered[lowest])), int(ordered[highest]))


class _Assignment:
    """An assignment of units and idle units to bins in which no cycle of moves between bins gains.

    Args:
        affinity: (n, bins) The affinity of each unit to each bin.
        capacity: (bins,) The units that each bin may hold.
        prices: (bins,) The prices by which the units choose their bins at first, whatever the loads.
    """

    def __init__(self, affinity: NDArray[np.integer], capacity: Integers, prices: Integers) -> None:
        bins = len(capacity)
        self.affinity = np.ascontiguousarray(affinity, np.int64)
        self.capacity = np.ascontiguousarray(capacity, np.int64)
        self.place: NDArray[np.intp] = (affinity - prices).argmax(axis=1)
        """(n,) The bin of each unit."""
        self.load = np.bincount(self.place, minlength=bins)
        """(bins,) The units in each bin, idle ones not counted."""
        self.idle = self._place_idle(prices)
        """(bins,) The idle units in each bin."""
        self.loss = np.empty((bins, bins), np.int64)
        """(bins, bins) The least loss of affinity for which a unit, idle or not, moves from one bin to another; it is
        filled by :meth:`balance`."""

    def balance(self) -> None:
        """Move units along shortest paths until no bin is above its capacity."""
        loss = _balance_compiled(self.affinity, self.capacity, self.place, self.load, self.idle)
        if loss is not None:
            self.loss = loss
            return
        for bin_ in range(len(self.capacity)):
            self._update_loss(bin_)
        while True:
            excess = self.load + self.idle - self.capacity
            if not (excess > 0).any():
                return
            _, previous = self._shortest_paths(np.where(excess > 0, 0, NEVER))
            path = [int(excess.argmin())]
            while previous[path[0]] >= 0:
                path.insert(0, int(previous[path[0]]))
            self._move(path, int(min(excess[path[0]], -excess[path[-1]])))

    def prices(self) -> Integers:
        """Return the dual solution: (bins,) prices at which every unit is in a bin that it prefers."""
        distance, _ = self._shortest_paths(np.zeros(len(self.capacity), np.int64))
        return -distance

    def _place_idle(self, prices: Integers) -> Integers:
        """Return the (bins,) idle units in each bin: they fill the cheapest bins, one of which takes the rest."""
        count = self.capacity.sum() - len(self.place)
        room = np.where(prices == prices.min(), np.maximum(self.capacity - self.load, 0), 0)
        filled = np.minimum(room.cumsum(), count)
        idle: Integers = np.diff(filled, prepend=0)
        idle[prices.argmin()] += count - filled[-1]
        return idle

    def _update_loss(self, bin_: int) -> None:
        inside = self.affinity.take(np.flatnonzero(self.place == bin_), axis=0)
        loss = (inside[:, [bin_]] - inside).min(axis=0, initial=NEVER)
        self.loss[bin_] = np.minimum(loss, 0) if self.idle[bin_] else loss

    def _shortest_paths(self, distance: Integers) -> tuple[Integers, NDArray[np.intp]]:
        """Return each bin's (bins,) distance, at most ``distance``, and the bin before it or -1 (Bellman-Ford)."""
        previous = np.full(len(distance), -1)
        while True:
            through = distance[:, None] + self.loss
            shorter = through.min(axis=0)
            better = shorter < distance
            if not better.any():
                return distance, previous
            previous = np.where(better, through.argmin(axis=0), previous)
            distance = np.minimum(distance, shorter)

    def _move(self, path: list[int], amount: int) -> None:
        """Move units along the path: as many as are tied for the loss of every edge, up to ``amount``."""
        moves = []
        for source, target in pairwise(path):
            units = np.flatnonzero(self.place == source)
            loss = self.loss[source, target]
            tied = units[self.affinity[units, source] - self.affinity[units, target] == loss]
            idle = int(self.idle[source]) if loss == 0 else 0
            moves.append((source, target, tied, idle))
            amount = min(amount, len(tied) + idle)
        for source, target, tied, idle in moves:
            moved_idle = min(idle, amount)
            moved = tied[: amount - moved_idle]
            self.place[moved] = target
            self.load[[source, target]] += -len(moved), len(moved)
            self.idle[[source, target]] += -moved_idle, moved_idle
        for bin_ in path:
            self._update_loss(bin_)
