"""The lattice: each token's neighbours among the symmetry classes, and what pulls their embeddings together.

For the token at place q of class r (its place among the tokens of its class in the order of their ids), the neighbours
are the tokens at place q of every other class, its shell, and its partner, the token at place q XOR 1 of its own class,
where they exist: at most 12 for the symmetry order 12, the kissing number of spheres in three dimensions. The relation
is symmetric. The coupling adds

    loss(E) = coupling / 4 * sum over t of sum over neighbours n of t of |E_t - E_n|^2

whose gradient in row t is coupling * ((k + 1) E_t - (sum over the shell, t included) - E_partner), k being the number
of neighbours. The table is class-major (:mod:`hiermpi.model.parameters`), so classes are slices of rows.
"""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.loops import pull_together


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
        chosen = range(len(self._factors)) if classes is None else classes
        return pull_together(out, table, self.bounds, self._factors, coupling, chosen)
