"""AdamW (Loshchilov, Hutter 2019) as a pure function on flat vectors: reads one slot, writes another."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels import Kernels, load_kernels
from hiermpi.kernels.compiled import CompiledKernels
from hiermpi.kernels.memory import plain_float32

Vector = NDArray[np.float32]

BLOCK = 1 << 15
"""Elements of a pass of the numpy form: small enough that its temporaries stay in the cache."""


class Moments(NamedTuple):
    """Adam's, in vectors of the parameters' layout."""

    m: Vector
    v: Vector


def adamw_update(
    parameters: Vector,
    gradients: Vector,
    m: Vector,
    v: Vector,
    *,
    count: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    decay_ranges: Sequence[tuple[int, int, bool]],
    scale: float,
    out_parameters: Vector,
    out_m: Vector,
    out_v: Vector,
    eps: float = 1e-8,
    kernels: Kernels | None = None,
) -> None:
    """Apply one update to vectors of one layout.

    Args:
        parameters, m, v: what is read; the ``out`` vectors may be the same arrays.
        gradients: sums over the tokens of the step.
        count: updates applied including this one, Adam's t.
        learning_rate, beta1, beta2, weight_decay, eps: as in the paper.
        decay_ranges: (start, stop, whether to decay) that cover the vectors.
        scale: one factor on the gradients: 1 / tokens, times the clipping.
        kernels: by default the environment's.
    """
    kernels = kernels or load_kernels()
    step_size = learning_rate / (1.0 - beta1**count)
    root_correction = 1.0 / sqrt(1.0 - beta2**count)
    compiled = kernels if isinstance(kernels, CompiledKernels) else None
    arrays = (out_parameters, out_m, out_v, parameters, gradients, m, v)
    for start, stop, decay in decay_ranges:
        shrink = 1.0 - learning_rate * weight_decay if decay else 1.0
        numbers = (scale, beta1, beta2, step_size, root_correction, eps, shrink)
        if compiled is not None and plain_float32(*arrays):
            compiled.adamw([array[start:stop] for array in arrays], *numbers)
            continue
        for first in range(start, stop, BLOCK):
            _update_block([array[first : min(first + BLOCK, stop)] for array in arrays], *numbers)


def _update_block(
    arrays: Sequence[Vector],
    scale: float,
    beta1: float,
    beta2: float,
    step_size: float,
    root_correction: float,
    eps: float,
    shrink: float,
) -> None:
    out, out_m, out_v, parameters, gradients, m, v = arrays
    single = np.float32
    x = gradients * single(scale)
    np.add(m * single(beta1), x * (single(1) - single(beta1)), out=out_m)
    np.add(v * single(beta2), (x * x) * (single(1) - single(beta2)), out=out_v)
    change = out_m / (np.sqrt(out_v) * single(root_correction) + single(eps))
    np.subtract(parameters * single(shrink), change * single(step_size), out=out)
