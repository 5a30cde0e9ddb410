"""Sums that do not depend on the order: 64-bit fixed point.

A value x is kept as the integer nearest to x / UNIT (ties to even), and integers add up to the same bits in any order,
on any number of ranks, under any MPI algorithm. Each addend is off by at most UNIT / 2 = 2^-41, so a sum of n addends
by n 2^-41: for values above about 1e-5 that is less than the rounding of float32 sums. Addends are refused from a bound
on which keeps the sum of all of them inside 63 bits, so nothing ever wraps.

The alternatives: pre-rounded sums (Demmel and Nguyen, Parallel reproducible summation, 2015; ReproBLAS) keep the
exponent range of floats but need two passes or several accumulators; a fixed binary tree over the addends (as KaMPIng's
reproducible reduce) needs all addends of a subtree in one place. Fixed point is one pass and one MPI_SUM.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config
from hiermpi.kernels import Kernels, load_kernels

UNIT_EXPONENT = -40
UNIT = 2.0**UNIT_EXPONENT
LOSS_UNIT = 2.0**-24
"""Of losses: multiples of it below 2^29 add up exactly in float64."""
AUTOMATIC_UNIT_TOKENS = 512
FEWEST_UNITS = 16
"""Of a batch, where the choice is automatic: so many leaves have work."""


def unit_sequences(config: Config) -> int:
    """Sequences of a unit: ``train.micro_batch_size``, or a choice that depends on nothing but the configuration."""
    if config.train.micro_batch_size:
        return config.train.micro_batch_size
    by_tokens = AUTOMATIC_UNIT_TOKENS // config.model.context_length
    return max(1, min(by_tokens, -(-config.train.batch_size // FEWEST_UNITS)))


def routed_together(config: Config) -> int:
    """Sequences that are routed as one: a unit where ``hierarchy.reproducible``, else each by itself."""
    return unit_sequences(config) if config.hierarchy.reproducible else 1


def summed_type(config: Config) -> type[np.int64] | type[np.float32]:
    """The type of the vectors that are summed over the ranks."""
    return np.int64 if config.hierarchy.reproducible else np.float32


def largest_addend(n_units: int) -> float:
    """Where addends end if ``n_units`` of them must fit into a sum."""
    return 2.0 ** (62 + UNIT_EXPONENT) / max(n_units, 1)


def rounded_loss(loss: float) -> float:
    """A loss as a multiple of :data:`LOSS_UNIT`; what is not finite stays so."""
    return float(np.rint(loss / LOSS_UNIT) * LOSS_UNIT)


def add_fixed(
    sums: NDArray[np.int64], x: NDArray[np.float32], limit: float, fresh: bool, kernels: Kernels | None = None
) -> bool:
    """Add x to sums, or write it there; whether every element was finite and below ``limit``.

    Args:
        sums: (n,) in units of :data:`UNIT`.
        x: (n,).
        limit: see :func:`largest_addend`.
        fresh: write instead of adding.
        kernels: by default the environment's.
    """
    return (kernels or load_kernels()).add_fixed(sums, x, UNIT, limit, fresh)


def from_fixed(out: NDArray[np.float32], sums: NDArray[np.int64], kernels: Kernels | None = None) -> None:
    """Write the sums, rounded to float32, to ``out`` (n,)."""
    (kernels or load_kernels()).from_fixed(out, sums, UNIT)


def differing(kinds: Sequence[str]) -> tuple[int, int] | None:
    """Two ranks of different ``kinds`` (one per rank), the first such; None where all are alike."""
    return next(((0, rank) for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
