"""The lattice: each token's neighbours among the symmetry classes, and what pulls their embeddings together.

For the token at place q of class r (its place among the tokens of its class in the order of their ids), the neighbours
are the tokens at place q of every other class, its shell, and its partner, the token at place q XOR 1 of its own class,
where they exist: at most 12 for the symmetry order 12, the kissing number of spheres in three dimensions. The relation
is symmetric. The coupling adds

    loss(E) = coupling / 4 * sum over t of sum over neighbours n of t of |E_t - E_n|^2

whose gradient in row t is coupling * ((k + 1) E_t - (sum over the shell, t included) - E_partner), k being the number
of neighbours. The table is class-major (:mod:`hiermpi.model.symmetry`), so classes are slices of rows.
"""

from collections.abc import Collection
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.loops import compiled_loops
from hiermpi.kernels.memory import address_of, plain_float32


class Lattice:
    """The neighbours in a class-major table.

    Args:
        class_bounds: (S + 1,) rows at which the classes begin, and V.
    """

    def __init__(self, class_bounds: NDArray[np.int64]) -> None:
        self.bounds = np.ascontiguousarray(class_bounds, np.int64)
        sizes = np.diff(class_bounds)
        self.deepest = int(sizes.max(initial=0))
        shell = (sizes[:, None] > np.arange(self.deepest)).sum(axis=0)  # (Q,) classes that have a place q
        self._factors: list[NDArray[np.float32]] = []
        """For each class (n, 1): k + 1."""
        for size in sizes:
            place = np.arange(size)
            neighbours = shell[:size] - 1 + ((place ^ 1) < size)
            self._factors.append((neighbours + 1)[:, None].astype(np.float32))

    def add_gradient(
        self,
        out: NDArray[np.floating],
        table: NDArray[np.floating],
        coupling: float,
        classes: Collection[int] | None = None,
    ) -> NDArray[np.float64]:
        """Add the gradient of the rows of ``classes`` (all by default) to ``out`` (V, C). O(V C).

        Returns (S,) the share of each of these classes in the loss, for the (V, C) ``table``.
        """
        losses = np.zeros(len(self._factors))
        chosen = range(len(self._factors)) if classes is None else classes
        loops, width = compiled_loops(), table.shape[1]
        if loops is not None and plain_float32(out, table):
            for index in chosen:
                arrays = (out, table, self.bounds, self._factors[index])
                losses[index] = coupling * loops.pull_together(
                    *map(address_of, arrays), len(losses), index, width, coupling
                )
            return losses
        shells = np.zeros((self.deepest, width), table.dtype)
        for start, stop in pairwise(self.bounds):
            shells[: stop - start] += table[start:stop]
        for index in chosen:
            start, stop = self.bounds[index : index + 2]
            rows = table[start:stop]
            pull = rows * self._factors[index]
            pull -= shells[: stop - start]
            even = (stop - start) & ~1  # places 2i and 2i + 1 are partners; a last odd one has none
            pairs, pulled = rows[:even].reshape(-1, 2, width), pull[:even].reshape(-1, 2, width)
            pulled -= pairs[:, ::-1]
            losses[index] = 0.5 * coupling * float(np.vdot(rows, pull))
            pull *= table.dtype.type(coupling)
            out[start:stop] += pull
        return losses
