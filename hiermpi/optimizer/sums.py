"""What is summed over the ranks: gradients as they are, or in fixed point, whose sums do not depend on the order.

In 64-bit fixed point a value x is kept as the integer nearest to x / UNIT (ties to even), and integers add up to the
same bits in any order, on any number of ranks, under any MPI algorithm. Each addend is off by at most UNIT / 2 =
2^-41, so a sum of n addends by n 2^-41: for values above about 1e-5 that is less than the rounding of float32 sums.
Addends are refused from a bound on which keeps the sum of all of them inside 63 bits, so nothing ever wraps.

The alternatives: pre-rounded sums (Demmel and Nguyen, Parallel reproducible summation, 2015; ReproBLAS) keep the
exponent range of floats but need two passes or several accumulators; a fixed binary tree over the addends (as KaMPIng's
reproducible reduce) needs all addends of a subtree in one place. Fixed point is one pass and one MPI_SUM.
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


def sequences_at_once(config: Config) -> int:
    """Return how many sequences a leaf computes at once: a micro-batch, or a unit where units are added up."""
    micro_batch = micro_batch_sequences(config.model, config.train.micro_batch_size)
    return min(unit_sequences(config), micro_batch) if config.hierarchy.reproducible else micro_batch


def routed_together(config: Config) -> int:
    """Sequences that are routed as one: a unit where ``hierarchy.reproducible``, else each by itself."""
    return unit_sequences(config) if config.hierarchy.reproducible else 1


def summed_type(config: Config) -> type[np.int64] | type[np.float32]:
    """Return the element type of the vectors that are summed over the ranks."""
    return np.int64 if config.hierarchy.reproducible else np.float32


def largest_addend(n_units: int) -> float:
    """Where addends end if ``n_units`` of them must fit into a sum."""
    return 2.0 ** (62 + UNIT_EXPONENT) / max(n_units, 1)


def rounded_loss(loss: float) -> float:
    """A loss as a multiple of :data:`LOSS_UNIT`; what is not finite stays so."""
    return float(np.rint(loss / LOSS_UNIT) * LOSS_UNIT)


class GradientSums(Protocol):
    """A leaf's gradient sums, made unit by unit in float32 and summed over the ranks in a vector of their own kind."""

    vector: NDArray
    """What is summed over the ranks."""
    room: NDArray[np.float32]
    """Where the gradient of a unit is written before it is added."""
    unit: int
    """Sequences of a unit; 0 where all of a leaf's are one."""
    looks_later: bool
    """Whether :meth:`add` leaves it to the norm to find what is not finite, as the gradients stay as they are."""

    def add(self, fresh: bool) -> bool:
        """Add the unit's gradient to the sums, or begin them with it; tell whether all of it was good."""

    def rounded(self, loss: float) -> float:
        """Return a unit's loss as it is added up."""

    def total(self, spans: Sequence[tuple[int, int, int]], summed: NDArray) -> NDArray[np.float32]:
        """Return the sum over the ranks in float32, at least in ``spans`` (start, stop, owner)."""

    def complaints(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        """Name the tensors of the unit in work that are not finite, or too large for a sum."""


class FloatSums:
    """The gradients themselves, in float32: one unit, and no pass over them.

    Args:
        vector: Where they are summed.
        stays: Whether the sum over the ranks leaves this rank's own gradient as it was.
    """

    unit = 0

    def __init__(self, vector: NDArray[np.float32], stays: bool) -> None:
        self.vector = self.room = vector
        self.looks_later = stays

    def add(self, fresh: bool) -> bool:
        # What the sum overwrites is looked at now; else a norm that is not finite will tell, and then who it was.
        return self.looks_later or all_finite(self.vector)

    def rounded(self, loss: float) -> float:
        return loss

    def total(self, spans: Sequence[tuple[int, int, int]], summed: NDArray) -> NDArray[np.float32]:
        return summed

    def complaints(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        return [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]


class FixedPointSums:
    """The gradients of units, each as it would be on any other rank, added up in fixed point.

    Args:
        vector: Where they are summed, int64.
        unit: Sequences of a unit.
        n_units: Units of a whole batch.
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
        vector: A vector of :func:`summed_type`, where it is summed over the ranks.
        stays: Whether that sum leaves this rank's own vector as it was.
    """
    if not config.hierarchy.reproducible:
        return FloatSums(vector, stays)
    unit = unit_sequences(config)
    return FixedPointSums(vector, unit, -(-config.train.batch_size // unit))


def all_finite(vector: NDArray[np.float32]) -> bool:
    """Tell whether no element of ``vector`` is NaN or infinite."""
    # One cheap pass: a sum is finite unless an element is not, or the sum overflows; only then look closely.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(vector.sum())) or bool(np.isfinite(vector).all())


def differing(kinds: Sequence[str]) -> tuple[int, int] | None:
    """Two ranks of different ``kinds`` (one per rank), the first such; None where all are alike."""
    return next(((0, rank) for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
