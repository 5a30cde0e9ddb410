"""One contiguous vector for all parameters, with named tensors as views into it.

So a reduction needs no packing, the optimizer is one pass, and a checkpoint is a few datasets. Gradients and
moments are vectors of the same layout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.kernels.memory import aligned_zeros, round_up


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a model."""

    name: str
    shape: tuple[int, ...]
    decay: bool = False
    """Whether weight decay applies."""
    symmetry_rows: bool = False
    """Whether axis 0 is the token table's, ordered by symmetry class."""

    @property
    def size(self) -> int:
        return prod(self.shape)


class ParameterLayout:
    """Where each tensor stands in the vector. Allocates nothing.

    Args:
        specs: the tensors, in their order within the vector.

    Between tensors the vector has padding (zeros) up to the next cache line.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.offsets: dict[str, int] = {}
        end = 0
        for spec in self.specs:
            self.offsets[spec.name] = end
            end += round_up(4 * spec.size) // 4  # by float32, so that layouts of all types agree
        self.size = end

    @property
    def count(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(spec.size for spec in self.specs)

    def decay_ranges(self) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, decay) of maximal runs of tensors that agree on ``decay``, covering the vector."""
        return self.runs(lambda spec: spec.decay)

    def runs(self, of: Callable[[TensorSpec], bool]) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether) of maximal runs of tensors that agree on what ``of`` says, covering the vector."""
        bounds = [self.offsets[spec.name] for spec in self.specs] + [self.size]
        for whether, run in groupby(range(len(self.specs)), lambda index: of(self.specs[index])):
            indices = list(run)
            yield bounds[indices[0]], bounds[indices[-1] + 1], whether


class ParameterBuffer(ParameterLayout):
    """A flat vector and its named views; or two, of which one is read while the other is written (slots).

    Args:
        specs: the tensors, in their order within the vector.
        dtype: element type (float32 in training, float64 in gradient checks).
        storage: one or two 1-D arrays of :attr:`size` elements to use instead of new memory.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], dtype: DTypeLike = np.float32, storage: Sequence[NDArray] = ()
    ) -> None:
        super().__init__(specs)
        self.dtype = np.dtype(dtype)
        self.slots = tuple(storage) or (aligned_zeros(self.size, self.dtype),)
        for vector in self.slots:
            if vector.shape != (self.size,) or vector.dtype != self.dtype:
                raise ValueError(f"storage is {vector.dtype}{vector.shape}, expected {self.dtype}({self.size},)")
        self.tensors_of = [self.views(vector) for vector in self.slots]
        """The named views into each slot."""
        self.slot = 0
        """The slot in use."""

    @property
    def vector(self) -> NDArray:
        """The parameters."""
        return self.slots[self.slot]

    @property
    def tensors(self) -> dict[str, NDArray]:
        """Named views into them. After a flip they are others."""
        return self.tensors_of[self.slot]

    @property
    def next(self) -> NDArray:
        """Where an update is written to: the other slot, or the parameters themselves where there is but one."""
        return self.slots[-1 - self.slot]

    def flip(self) -> None:
        """Make what was written the parameters, whole; where there is but one slot, they are already."""
        self.slot = len(self.slots) - 1 - self.slot

    def views(self, vector: NDArray) -> dict[str, NDArray]:
        """Named views into another vector of this layout (gradients, moments)."""
        return {spec.name: self.view(vector, spec) for spec in self.specs}

    def view(self, vector: NDArray, spec: TensorSpec) -> NDArray:
        """One of :meth:`views`."""
        offset = self.offsets[spec.name]
        return vector[offset : offset + spec.size].reshape(spec.shape)

    def __getitem__(self, name: str) -> NDArray:
        return self.tensors[name]

    def new_vector(self) -> NDArray:
        """A zeroed vector of this layout."""
        return aligned_zeros(self.size, self.dtype)
