"""The transportation problem of routing, solved exactly: units to few bins with capacities, greatest total affinity.

Slack becomes dummy units of no affinity, so that every bin is exactly full and prices may have either sign. An
assignment is optimal when each unit sits in a bin of greatest ``affinity - price`` (complementary slackness). The
first phase finds good prices by coordinate descent on the dual, one order statistic per bin; units then take their
best bin, which leaves some bins too full. The second phase repairs that by successive shortest paths between bins,
an edge being the cheapest move of a unit, and adjusts the prices so that the condition above holds throughout
(Ahuja, Magnanti, Orlin, Network Flows, 1993, sections 9.7 and 12.4). Integer arithmetic; no randomness.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

DESCENT_ROUNDS = 40


def assign(affinity: Integers, capacity: Integers) -> NDArray[np.intp]:
    """Bin of each unit, maximising the total affinity with no bin above its capacity.

    Args:
        affinity: (n, bins) integers, at least 0.
        capacity: (bins,) integers, at least 0.

    Returns:
        (n,) bin of each unit; a pure function of the arguments.

    Raises:
        ValueError: the capacities do not hold all units.
    """
    n, bins = affinity.shape
    room = int(capacity.sum())
    if room < n:
        raise ValueError(f"{n} units do not fit into a capacity of {room}")
    if n == 0:
        return np.zeros(0, np.intp)
    # (bins, units), so that a bin's column is contiguous.
    gain = np.zeros((bins, room), np.int64)
    gain[:, :n] = affinity.T
    place = _Repair(gain, np.asarray(capacity, np.int64), _descend(gain, capacity)).run()
    return place[:n]


def _descend(gain: Integers, capacity: Integers) -> Integers:
    """(bins,) prices under which about ``capacity`` units prefer each bin."""
    bins = len(gain)
    prices = np.zeros(bins, np.int64)
    if bins == 1:
        return prices
    net = gain.copy()
    for _ in range(DESCENT_ROUNDS):
        before = prices.copy()
        for g in range(bins):
            others = np.delete(net, g, axis=0).max(axis=0)
            prices[g] = _clearing_price(gain[g] - others, int(capacity[g]))
            np.subtract(gain[g], prices[g], out=net[g])
        if np.array_equal(before, prices):
            break
    return prices


def _clearing_price(margin: Integers, capacity: int) -> int:
    """A price that ``capacity`` of the margins are not below, and the rest not above."""
    n = len(margin)
    if capacity in (0, n):
        return int(margin.max()) + 1 if capacity == 0 else int(margin.min())
    ordered = np.partition(margin, (n - capacity - 1, n - capacity))
    return int(ordered[n - capacity - 1] + ordered[n - capacity]) // 2


class _Repair:
    """Successive shortest paths from bins that are too full to bins with room."""

    def __init__(self, gain: Integers, capacity: Integers, prices: Integers) -> None:
        self.gain = gain
        self.capacity = capacity
        self.prices = prices
        bins = len(gain)
        self.place = np.asarray((gain - prices[:, None]).argmax(axis=0))
        self.load = np.bincount(self.place, minlength=bins)
        self.cost = np.full((bins, bins), np.iinfo(np.int64).max // 4)
        """Gain lost by the cheapest move of a unit from one bin to another, prices not counted."""
        for bin_ in range(bins):
            self._refresh(bin_)

    def run(self) -> NDArray[np.intp]:
        """(room,) bin of each unit, no bin above its capacity."""
        while (self.load > self.capacity).any():
            path, distance = self._shortest_path()
            self.prices -= np.minimum(distance, distance[path[-1]])
            self._move_along(path)
        return self.place

    def _refresh(self, bin_: int) -> None:
        units = np.flatnonzero(self.place == bin_)
        if len(units):
            self.cost[bin_] = (self.gain[bin_, units] - self.gain[:, units]).min(axis=1)
        else:
            self.cost[bin_] = np.iinfo(np.int64).max // 4

    def _shortest_path(self) -> tuple[list[int], Integers]:
        """Bins from one that is too full to the nearest with room, and every bin's distance (Dijkstra)."""
        bins = len(self.load)
        reduced = self.cost - self.prices[:, None] + self.prices[None, :]
        far = np.iinfo(np.int64).max // 2
        distance = np.where(self.load > self.capacity, 0, far)
        parent = np.full(bins, -1)
        done = np.zeros(bins, bool)
        while True:
            here = int(np.where(done, far + 1, distance).argmin())
            if self.load[here] < self.capacity[here]:
                break
            done[here] = True
            through = distance[here] + reduced[here]
            better = (through < distance) & ~done
            distance[better] = through[better]
            parent[better] = here
        path = [here]
        while parent[path[0]] >= 0:
            path.insert(0, int(parent[path[0]]))
        return path, np.where(done, distance, distance[here])

    def _move_along(self, path: list[int]) -> None:
        """Move as many units along the path as are tied for its cost."""
        amount = min(self.load[path[0]] - self.capacity[path[0]], self.capacity[path[-1]] - self.load[path[-1]])
        moves = []
        for source, target in pairwise(path):
            units = np.flatnonzero(self.place == source)
            tied = units[self.gain[source, units] - self.gain[target, units] == self.cost[source, target]]
            moves.append((tied, target))
            amount = min(amount, len(tied))
        for tied, target in moves:
            self.place[tied[:amount]] = target
        self.load[path[0]] -= amount
        self.load[path[-1]] += amount
        for bin_ in path:
            self._refresh(bin_)
