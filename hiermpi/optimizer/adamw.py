"""AdamW (Loshchilov, Hutter 2019) as a pure function on flat vectors: reads one slot, writes another."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels import Kernels, load_kernels

Vector = NDArray[np.float32]


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
    arrays = (out_parameters, out_m, out_v, parameters, gradients, m, v)
    for start, stop, decay in decay_ranges:
        shrink = 1.0 - learning_rate * weight_decay if decay else 1.0
        numbers = (scale, beta1, beta2, step_size, root_correction, eps, shrink)
        kernels.adamw([array[start:stop] for array in arrays], *numbers)
