"""This module forms the vectors that are summed over the ranks: float32 gradients, or gradients in fixed point.

Sums in fixed point do not depend on the order of their addends.

In 64-bit fixed point a value x is kept as the integer nearest to x / UNIT (ties to even), and integers add up to the
same bits in any order, on any number of ranks, under any MPI algorithm. The error of each addend is at most UNIT / 2 =
2^-41, and that of a sum of n addends at most n 2^-41: for values above about 1e-5 that is less than the rounding of
float32 sums. Addends at or above a bound that keeps the sum of all of them inside 63 bits are refused, so no sum ever
wraps.

There are alternatives. Pre-rounded sums (Demmel and Nguyen, Parallel reproducible summation, 2015; ReproBLAS) keep the
exponent range of floats but need two passes or several accumulators. A fixed binary tree over the addends (as KaMPIng's
reproducible reduce) needs all addends of a subtree on one rank. Fixed point needs one pass and one MPI_SUM.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config
from hiermpi.kernels import load_kernels
from hiermpi.kernels.memory import lazy_zeros
from hiermpi.model.contract import micro_batch_sequences

UNIT_EXPONENT = -40
UNIT = 2.0**UNIT_EXPONENT
LOSS_UNIT = 2.0**-24
"""The unit of losses: multiples of it below 2^29 add up exactly in float64."""
AUTOMATIC_UNIT_TOKENS = 512
"""The most tokens of a unit where its size is chosen automatically."""
FEWEST_UNITS = 16
"""The number of units that a batch has at least where their size is chosen automatically, so that many leaves have
work."""


def unit_sequences(config: Config) -> int:
    """Return the sequences of a unit: ``train.micro_batch_size``, or a choice by the configuration alone."""
    if config.train.micro_batch_size:
        return config.train.micro_batch_size
    by_tokens = AUTOMATIC_UNIT_TOKENS // config.model.context_length
    return max(1, min(by_tokens, -(-config.train.batch_size // FEWEST_UNITS)))


def sequences_at_once(config: Config) -> int:
    """Return how many sequences a leaf computes at once: a micro-batch, or at most a unit where units are added up."""
    micro_batch = micro_batch_sequences(config.model, config.train.micro_batch_size)
    return min(unit_sequences(config), micro_batch) if config.hierarchy.reproducible else micro_batch


def routed_together(config: Config) -> int:
    """Return how many sequences are routed as one: those of a unit where ``hierarchy.reproducible``, else 1."""
    return unit_sequences(config) if config.hierarchy.reproducible else 1


def summed_type(config: Config) -> type[np.int64] | type[np.float32]:
    """Return the element type of the vectors that are summed over the ranks."""
    return np.int64 if config.hierarchy.reproducible else np.float32


def largest_addend(n_units: int) -> float:
    """Return the bound below which addends must be so that ``n_units`` of them fit into a sum."""
    return 2.0 ** (62 + UNIT_EXPONENT) / max(n_units, 1)


def rounded_loss(loss: float) -> float:
    """Return a loss rounded to a multiple of :data:`LOSS_UNIT`; a loss that is not finite is returned as it is."""
    return float(np.rint(loss / LOSS_UNIT) * LOSS_UNIT)


class GradientSums(Protocol):
    """A leaf's gradient sums, computed unit by unit in float32 and summed over the ranks in a vector of some type."""

    vector: NDArray
    """The vector that is summed over the ranks."""
    room: NDArray[np.float32]
    """The memory to which the gradient of a unit is written before it is added."""
    unit: int
    """The number of sequences of a unit; 0 where all sequences of a leaf are one unit."""
    looks_later: bool
    """Whether :meth:`add` does not check that gradients are finite: they are kept, and the norm shows it later."""

    def add(self, fresh: bool) -> bool:
        """Add the unit's gradient to the sums, or begin them with it where ``fresh``; tell whether it can be used."""

    def rounded(self, loss: float) -> float:
        """Return a unit's loss rounded as the sums need it."""

    def total(self, spans: Sequence[tuple[int, int, int]], summed: NDArray) -> NDArray[np.float32]:
        """Return the sum over the ranks in float32, at least in ``spans`` (start, stop, owner)."""

    def complaints(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        """Return the names of the current unit's tensors that are not finite, or too large for a sum."""


class FloatSums:
    """Sums of the float32 gradients themselves: all sequences of a leaf are one unit, and no further pass is needed.

    Args:
        vector: The vector in which they are summed.
        stays: Whether the sum over the ranks leaves this rank's own gradient as it was.
    """

    unit = 0

    def __init__(self, vector: NDArray[np.float32], stays: bool) -> None:
        self.vector = self.room = vector
        self.looks_later = stays

    def add(self, fresh: bool) -> bool:
        # Gradients that the sum will overwrite are checked now. Others are checked when the norm is not finite.
        return self.looks_later or all_finite(self.vector)

    def rounded(self, loss: float) -> float:
        return loss

    def total(self, spans: Sequence[tuple[int, int, int]], summed: NDArray) -> NDArray[np.float32]:
        return summed

    def complaints(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        return [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]


class FixedPointSums:
    """Sums in fixed point of the gradients of units, each of which would be the same on any other rank.

    Args:
        vector: The int64 vector in which they are summed.
        unit: The number of sequences of a unit.
        n_units: The number of units of a whole batch.
    """

    looks_later = False

    def __init__(self, vector: NDArray[np.int64], unit: int, n_units: int) -> None:
        self.vector = vector
        self.room = lazy_zeros(len(vector), np.float32)
        self.unit = unit
        self.largest = largest_addend(n_units)
        self.kernels = load_kernels()

    def add(self, fresh: bool) -> bool:
        return self.kernels.add_fixed(self.vector, self.room, UNIT, self.largest, fresh)

    def rounded(self, loss: float) -> float:
        return rounded_loss(loss)

    def total(self, spans: Sequence[tuple[int, int, int]], summed: NDArray) -> NDArray[np.float32]:
        for start, stop, _ in spans:
            self.kernels.from_fixed(self.room[start:stop], summed[start:stop], UNIT)
        return self.room

    def complaints(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        names = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        if names:
            return names
        large = np.float32(self.largest)
        return [f"{name} (too large for a sum)" for name, t in tensors.items() if (np.abs(t) >= large).any()]


def make_sums(config: Config, vector: NDArray, stays: bool) -> GradientSums:
    """Make the sums that a run needs.

    Args:
        config: The resolved configuration.
        vector: The vector, of :func:`summed_type`, that is summed over the ranks.
        stays: Whether that sum leaves this rank's own vector as it was.
    """
    if not config.hierarchy.reproducible:
        return FloatSums(vector, stays)
    unit = unit_sequences(config)
    return FixedPointSums(vector, unit, -(-config.train.batch_size // unit))


def all_finite(vector: NDArray[np.float32]) -> bool:
    """Tell whether no element of ``vector`` is NaN or infinite."""
    # One cheap pass is usually enough: a sum is finite unless an element is not, or the sum overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(vector.sum())) or bool(np.isfinite(vector).all())


def differing(kinds: Sequence[str]) -> tuple[int, int] | None:
    """Return the first two ranks whose ``kinds`` (one per rank) differ; None where all are alike."""
    return next(((0, rank) for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
