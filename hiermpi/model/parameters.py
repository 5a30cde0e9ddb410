"""This module keeps all parameters in one contiguous vector, with named tensors as views into it.

So a reduction needs no packing, the optimizer is one pass, and a checkpoint is a few datasets. Gradients and the
optimizer's state are vectors of the same layout.

Tensors whose rows belong to tokens are in class-major order: each symmetry class is one contiguous slice of rows. The
model works on row ids; token ids are mapped at the data boundary. Checkpoints, exports and logits are in token order.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.errors import DamagedFile
from hiermpi.kernels.loops import pull_together
from hiermpi.kernels.memory import aligned_zeros, round_up


@dataclass(frozen=True)
class TensorSpec:
    """The description of a named tensor of a model."""

    name: str
    shape: tuple[int, ...]
    decay: bool = False
    """Whether weight decay applies to the tensor."""
    symmetry_rows: bool = False
    """Whether axis 0 has one row per token, ordered by symmetry class."""

    @property
    def size(self) -> int:
        return prod(self.shape)


def symmetry_groups(known: NDArray[np.uint8] | None, vocab_size: int, symmetry_order: int) -> NDArray[np.uint8]:
    """Return the (V,) symmetry class of each token id.

    Args:
        known: The classes of the first ids; further ids go by id modulo the order. With None all ids do.
        vocab_size: The number of token ids, V.
        symmetry_order: The number of classes.
    """
    groups = (np.arange(vocab_size) % symmetry_order).astype(np.uint8)
    if known is not None:
        groups[: len(known)] = known[:vocab_size]
    return groups


class SymmetryTable:
    """The permutation between token ids and rows.

    Args:
        groups: (V,) The symmetry class of each token id.
        symmetry_order: The number of classes, S.

    Attributes:
        token_of_row: (V,) The token id of each row; rows are sorted by class, then by id.
        row_of_token: (V,) The row of each token id.
        class_bounds: (S + 1,) The rows at which the classes begin, and V.

    Raises:
        ValueError: A class is not below the order.
    """

    def __init__(self, groups: NDArray[np.uint8], symmetry_order: int) -> None:
        if len(groups) and groups.max() >= symmetry_order:
            raise ValueError(f"symmetry class {groups.max()} does not exist in a symmetry of order {symmetry_order}")
        self.token_of_row = np.argsort(groups, kind="stable")
        self.row_of_token = np.empty_like(self.token_of_row)
        self.row_of_token[self.token_of_row] = np.arange(len(groups))
        counts = np.bincount(groups, minlength=symmetry_order)
        self.class_bounds = np.concatenate([[0], np.cumsum(counts)])


class ParameterLayout:
    """The layout of the tensors in the vector; it allocates no memory.

    Between tensors the vector has padding (zeros) up to the next cache line.

    Args:
        specs: The specs of the tensors, in their order within the vector.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.offsets: dict[str, int] = {}
        end = 0
        for spec in self.specs:
            self.offsets[spec.name] = end
            end += round_up(4 * spec.size) // 4  # counted in float32, so that layouts of all types agree
        self.size = end

    @property
    def count(self) -> int:
        """Return the number of parameters without the padding."""
        return sum(spec.size for spec in self.specs)

    def decay_ranges(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, decay) of the maximal runs of tensors that agree on ``decay``; they cover the vector."""
        return self.runs(lambda spec: spec.decay)

    def runs(self, of: Callable[[TensorSpec], bool]) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, value) of the maximal runs of tensors with one value of ``of``; they cover the vector."""
        bounds = [self.offsets[spec.name] for spec in self.specs] + [self.size]
        for whether, run in groupby(range(len(self.specs)), lambda index: of(self.specs[index])):
            indices = list(run)
            yield bounds[indices[0]], bounds[indices[-1] + 1], whether


class ParameterBuffer(ParameterLayout):
    """A flat vector of parameters with named views into it; or two (slots), one of which is read while the other is
    written.

    Args:
        specs: The specs of the tensors, in their order within the vector.
        dtype: The element type: float32 in training, float64 in gradient checks.
        storage: One or two 1-D arrays of :attr:`size` elements to use instead of new memory.
        symmetry: The order of the rows that belong to tokens; by default it is that of the token ids.

    Raises:
        ValueError: An array of ``storage`` has another shape or element type.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        dtype: DTypeLike = np.float32,
        storage: Sequence[NDArray] = (),
        symmetry: SymmetryTable | None = None,
    ) -> None:
        super().__init__(specs)
        rows = next((spec.shape[0] for spec in self.specs if spec.symmetry_rows), 0)
        self.symmetry = symmetry or SymmetryTable(np.zeros(rows, np.uint8), 1)
        self.dtype = np.dtype(dtype)
        self.slots = tuple(storage) or (aligned_zeros(self.size, self.dtype),)
        for vector in self.slots:
            if vector.shape != (self.size,) or vector.dtype != self.dtype:
                raise ValueError(f"storage is {vector.dtype}{vector.shape}, expected {self.dtype}({self.size},)")
        self.tensors_of = [self.views(vector) for vector in self.slots]
        """The named views into each slot."""
        self.slot = 0
        """The number of the slot in use."""

    @property
    def vector(self) -> NDArray:
        """Return the vector of the parameters in use."""
        return self.slots[self.slot]

    @property
    def tensors(self) -> dict[str, NDArray]:
        """Return the named views into the vector in use; after :meth:`flip` they are others."""
        return self.tensors_of[self.slot]

    @property
    def next(self) -> NDArray:
        """Return the vector to which an update is written: the other slot, or the only one where there is one slot."""
        return self.slots[-1 - self.slot]

    def flip(self) -> None:
        """Make the slot that was written the one in use; with one slot nothing changes."""
        self.slot = len(self.slots) - 1 - self.slot

    def views(self, vector: NDArray) -> dict[str, NDArray]:
        """Return named views into another vector of this layout, such as gradients or moments."""
        return {spec.name: self.view(vector, spec) for spec in self.specs}

    def view(self, vector: NDArray, spec: TensorSpec) -> NDArray:
        """Return the view of one tensor into a vector of this layout."""
        offset = self.offsets[spec.name]
        return vector[offset : offset + spec.size].reshape(spec.shape)

    def __getitem__(self, name: str) -> NDArray:
        return self.tensors[name]

    def new_vector(self) -> NDArray:
        """Return a new zeroed vector of this layout."""
        return aligned_zeros(self.size, self.dtype)

    @property
    def row_of_token(self) -> NDArray[np.int64]:
        """Return the (V,) row of each token id."""
        return self.symmetry.row_of_token

    def tensors_in_token_order(self, vector: NDArray) -> dict[str, NDArray]:
        """Return copies of the tensors in a vector of this layout; rows that belong to tokens are in token order."""
        rows = self.symmetry.row_of_token
        return {
            spec.name: self.view(vector, spec)[rows] if spec.symmetry_rows else self.view(vector, spec).copy()
            for spec in self.specs
        }

    def load_token_order(self, tensors: Mapping[str, NDArray], vector: NDArray) -> None:
        """Fill a vector of this layout from tensors in token order. Raises DamagedFile where they do not fit."""
        require_tensors(self.specs, tensors, "the checkpoint")
        for spec in self.specs:
            source = tensors[spec.name]
            self.view(vector, spec)[...] = source[self.symmetry.token_of_row] if spec.symmetry_rows else source


def require_tensors(specs: Sequence[TensorSpec], tensors: Mapping[str, NDArray], source: str) -> None:
    """Check that the names and shapes of tensors are those of ``specs``.

    Args:
        specs: The specs of the tensors that are expected.
        tensors: The tensors that were found.
        source: The name of their source, for the message.

    Raises:
        DamagedFile: Names or shapes differ; the message names the first tensors that do not fit.
    """
    expected = {spec.name: spec.shape for spec in specs}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise DamagedFile(f"{source}: tensors do not fit the model's settings: {', '.join(names[:4])}")


class Lattice:
    """The lattice couples the embedding of each token to those of its neighbours among the symmetry classes.

    The token at position q of class r (in the order of the ids of its class) has as neighbours the tokens at position q
    of every other class, its shell, and its partner, the token at position q XOR 1 of its own class, where they exist.
    That makes at most 12 for the symmetry order 12, the kissing number of spheres in three dimensions. The relation is
    symmetric. The coupling adds

        loss(E) = coupling / 4 * sum over t of sum over neighbours n of t of |E_t - E_n|^2

    whose gradient in row t is coupling * ((k + 1) E_t - (sum over the shell, t included) - E_partner), k being the
    number of neighbours. The table is class-major, so classes are slices of rows.

    Args:
        class_bounds: (S + 1,) The rows at which the classes begin, and V.
    """

    def __init__(self, class_bounds: NDArray[np.int64]) -> None:
        self.bounds = np.ascontiguousarray(class_bounds, np.int64)
        sizes = np.diff(class_bounds)
        self.deepest = int(sizes.max(initial=0))
        shell = (sizes[:, None] > np.arange(self.deepest)).sum(axis=0)  # (Q,) the number of classes with a position q
        self._factors: list[NDArray[np.float32]] = []
        """The (n, 1) factors k + 1 of the rows of each class."""
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
        """Add the gradient of the rows of some classes to ``out``, in time O(V C).

        Args:
            out: (V, C) The gradient of the table.
            table: (V, C) The table of embeddings.
            coupling: The strength of the coupling.
            classes: The numbers of the classes; by default all.

        Returns:
            (S,) The share of each of these classes in the loss.
        """
        chosen = range(len(self._factors)) if classes is None else classes
        return pull_together(out, table, self.bounds, self._factors, coupling, chosen)
