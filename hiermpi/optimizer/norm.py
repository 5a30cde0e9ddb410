"""The gradient norm, independent of who holds which part of the vector.

Float64 sums of squares over fixed blocks of the canonical vector, added in the order of the blocks. Blocks never
cross a tensor, nor a symmetry class of a token table, so the owner of a class or tensor always holds whole blocks.
"""

from itertools import pairwise
from math import fsum, sqrt

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels import Kernels, load_kernels
from hiermpi.model.parameters import ParameterLayout

LARGEST_BLOCK = 4096
"""Elements: small enough that owners' shares, which are whole blocks, come out even."""


def norm_blocks(
    layout: ParameterLayout, class_bounds: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n + 1,) bounds of the blocks, which cover the vector with its padding, and (n,) their symmetry classes.

    The class is -1 where a block is not of a token table.

    Args:
        layout: of the vector.
        class_bounds: (S + 1,) rows at which the symmetry classes begin, and V.
    """
    starts: list[int] = []
    classes: list[int] = []
    for spec in layout.specs:
        offset, row = layout.offsets[spec.name], spec.size // spec.shape[0]
        parts, of_class = [0, spec.size], [-1]
        if spec.symmetry_rows and class_bounds is not None:
            parts, of_class = [int(bound) * row for bound in class_bounds], list(range(len(class_bounds) - 1))
        for (first, last), symmetry_class in zip(pairwise(parts), of_class, strict=True):
            begun = range(first, last, LARGEST_BLOCK)
            starts += [offset + start for start in begun]
            classes += [symmetry_class] * len(begun)
    return np.array([*starts, layout.size], np.int64), np.array(classes, np.int64)


def block_sums(
    vector: NDArray[np.floating],
    blocks: NDArray[np.int64],
    out: NDArray[np.float64],
    kernels: Kernels | None = None,
) -> None:
    """Write the sum of squares of each of the ``blocks``, (n, 2) starts and stops, in float64, to ``out`` (n,)."""
    (kernels or load_kernels()).block_sums(out, vector, blocks)


def total_norm(sums: NDArray[np.float64]) -> float:
    """The norm from the blocks' sums of squares; not finite where any of them is not."""
    if not np.isfinite(sums).all():
        return float("nan")
    return sqrt(fsum(sums))


def clip_scale(norm: float, limit: float) -> float:
    """The factor that brings a gradient of this norm to at most ``limit`` (0: never clips)."""
    return limit / norm if limit and norm > limit else 1.0
