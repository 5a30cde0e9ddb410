"""The gradient norm, independent of who holds which part of the vector.

Float64 sums of squares over fixed blocks of the canonical vector, added in the order of the blocks. Blocks never
cross a tensor, nor a symmetry class of a token table, so the owner of a class or tensor always holds whole blocks.
"""

from itertools import pairwise
from math import fsum, sqrt

import numpy as np
from numpy.typing import NDArray

from hiermpi.model.kernels import Kernels, load_kernels
from hiermpi.model.kernels.compiled import CompiledKernels, plain_float32
from hiermpi.model.parameters import ParameterLayout

LARGEST_BLOCK = 16384


def norm_blocks(layout: ParameterLayout, class_bounds: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """(n, 2) start and stop of every block, in the order of the vector.

    Args:
        layout: of the vector.
        class_bounds: (S + 1,) rows at which the symmetry classes begin, and V.
    """
    blocks = []
    for spec in layout.specs:
        offset, row = layout.offsets[spec.name], spec.size // spec.shape[0]
        parts = [0, spec.size]
        if spec.symmetry_rows and class_bounds is not None:
            parts = [int(bound) * row for bound in class_bounds]
        for first, last in pairwise(parts):
            blocks += [
                (offset + start, offset + min(start + LARGEST_BLOCK, last))
                for start in range(first, last, LARGEST_BLOCK)
            ]
    return np.array(blocks, np.int64).reshape(-1, 2)


def block_sums(
    vector: NDArray[np.floating],
    blocks: NDArray[np.int64],
    out: NDArray[np.float64],
    kernels: Kernels | None = None,
) -> None:
    """Write the sum of squares of each block, in float64, to ``out`` (n,)."""
    kernels = kernels or load_kernels()
    if isinstance(kernels, CompiledKernels) and plain_float32(vector):
        kernels.block_sums(out, vector, blocks)
        return
    for index, (start, stop) in enumerate(blocks):
        part = vector[start:stop].astype(np.float64)
        out[index] = np.dot(part, part)


def total_norm(sums: NDArray[np.float64]) -> float:
    """The norm from the blocks' sums of squares; not finite where any of them is not."""
    if not np.isfinite(sums).all():
        return float("nan")
    return sqrt(fsum(sums))


def clip_scale(norm: float, limit: float) -> float:
    """The factor that brings a gradient of this norm to at most ``limit`` (0: never clips)."""
    return limit / norm if limit and norm > limit else 1.0
