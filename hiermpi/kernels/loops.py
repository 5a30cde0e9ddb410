"""This module has the loops of reading, routing and coupling, each in numpy and compiled (loops.c).

The numpy form is the specification. Callers see one function for each loop. Where the library was built and the arrays
have the types that it takes, the compiled form runs; both give the same result.
"""

import ctypes
from collections.abc import Collection, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.library import load_library
from hiermpi.kernels.memory import address_of, plain_float32

ID_COLUMNS = 2
"""The number of int32 columns of a record that hold its int64 id, in loops.c too."""
MOST_BINS = 256
"""The most bins for which read_rows of loops.c has tables."""


@cache
def compiled_loops() -> ctypes.CDLL | None:
    """Return the library of loops.c; None where it was not built."""
    return load_library("_loops")


class Dealt(NamedTuple):
    """The result of routing: where the sequences of a batch go."""

    leaf: NDArray[np.int64]
    """(B,) The rank that computes each sequence."""
    bin: NDArray[np.int64]
    """(B,) The bin of each sequence."""
    tokens: int
    """The number of tokens of all sequences."""
    own_tokens: int
    """The number of those tokens that belong to the group in whose bin they are."""


def count_groups(
    tokens: NDArray[np.integer], group_of_token: NDArray[np.uint8], bins: int
) -> NDArray[np.int32]:
    """Count the tokens of each group in each sequence.

    Args:
        tokens: (B, T) The token ids; entries below 0 are padding and are not counted.
        group_of_token: (V,) The group of each token id, below ``bins``.
        bins: The number of columns of the result.

    Returns:
        (B, bins) The counts.
    """
    n, loops = len(tokens), compiled_loops()
    if loops is not None and tokens.dtype == np.int32 and tokens.strides[1:] == (4,):
        counts = np.zeros((n, bins), np.int32)
        arrays = (counts, tokens, group_of_token)
        loops.count_groups(*map(address_of, arrays), n, tokens.shape[1], tokens.strides[0] // 4, bins)
        return counts
    cell = bins * np.arange(n)[:, None] + group_of_token[tokens]  # padding's cells are removed below
    present = tokens >= 0
    counted = cell.reshape(-1) if present.all() else cell[present]
    return np.bincount(counted, minlength=n * bins).astype(np.int32).reshape(n, bins)


def deal(
    counts: NDArray[np.integer],
    unit_bin: NDArray[np.integer],
    unit: int,
    leaves: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> Dealt:
    """Assign the units of each bin to its leaves in turn, in the order of the batch.

    Args:
        counts: (B, bins) The tokens of each group in each sequence.
        unit_bin: (units,) The bin of each unit.
        unit: The number of sequences of a unit; the last unit may have fewer.
        leaves: The ranks of all bins, one bin after another.
        bounds: (bins + 1,) The indices in ``leaves`` at which the bins begin, and the number of leaves.
    """
    (n, bins), loops = counts.shape, compiled_loops()
    if loops is not None:
        leaf, chosen, totals = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(2, np.int64)
        unit_bin, counts = np.ascontiguousarray(unit_bin, np.int64), np.ascontiguousarray(counts, np.int32)
        arrays = (leaf, chosen, totals, counts, unit_bin, leaves, bounds, np.empty(bins, np.int64))
        loops.deal(*map(address_of, arrays), n, unit, bins)
        return Dealt(leaf, chosen, int(totals[0]), int(totals[1]))
    unit_of = np.arange(n) // unit
    chosen = unit_bin[unit_of].astype(np.int64)
    members = [leaves[first:last] for first, last in pairwise(bounds)]
    own = counts[np.arange(n), chosen].sum()
    return Dealt(leaves_in_turn(unit_bin, members)[unit_of], chosen, int(counts.sum()), int(own))


def leaves_in_turn(bins: NDArray[np.integer], leaves: Sequence[Sequence[int] | NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the (n,) leaf of each unit: the units of a bin go to its leaves in turn, in the order of the batch.

    Args:
        bins: (n,) The bin of each unit.
        leaves: The ranks of each bin.
    """
    leaf = np.empty(len(bins), np.int64)
    for index, members in enumerate(leaves):
        mine = np.flatnonzero(bins == index)
        if len(mine):
            leaf[mine] = np.asarray(members)[np.arange(len(mine)) % len(members)]
    return leaf


def read_records(
    records: NDArray[np.int32],
    tokens: NDArray[np.unsignedinteger],
    sequence_ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    row_of_token: NDArray[np.int32],
    group_of_token: NDArray[np.uint8],
    bins: int,
) -> NDArray[np.int32]:
    """Write the records of a batch, and count the groups of its tokens, in one pass.

    Args:
        records: (B, ID_COLUMNS + T + 1) The records to write: the sequence's id, then the rows of its tokens.
        tokens: (n,) The token ids of a split, uint16 or uint32.
        sequence_ids: (B,) The ids of the sequences.
        starts: (B,) The positions in the split at which the sequences begin.
        row_of_token: (V,) The row of the model's table for each token id.
        group_of_token: (V,) The group of each token id, below ``bins``.
        bins: The number of columns of the result.

    Returns:
        (B, bins) The counts over all tokens but the last of each sequence.
    """
    n, length, loops = len(starts), records.shape[1] - ID_COLUMNS, compiled_loops()
    if loops is not None and bins <= MOST_BINS:
        counts = np.empty((n, bins), np.int32)
        arrays = (records, counts, tokens, sequence_ids, starts, row_of_token, group_of_token)
        read = loops.read_rows16 if tokens.dtype == np.uint16 else loops.read_rows32
        read(*map(address_of, arrays), n, length, bins)
        return counts
    taken = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
    records[:, :ID_COLUMNS] = np.ascontiguousarray(sequence_ids, np.int64).view(np.int32).reshape(-1, ID_COLUMNS)
    records[:, ID_COLUMNS:] = row_of_token[taken]
    cell = bins * np.arange(n)[:, None] + group_of_token[taken[:, :-1]]
    return np.bincount(cell.reshape(-1), minlength=n * bins).astype(np.int32).reshape(n, bins)


def pull_together(
    out: NDArray[np.floating],
    table: NDArray[np.floating],
    bounds: NDArray[np.int64],
    factors: Sequence[NDArray[np.float32]],
    coupling: float,
    classes: Collection[int],
) -> NDArray[np.float64]:
    """Add the gradient of the lattice's coupling to the rows of some symmetry classes.

    Row q of a class is pulled to row q of every other class and to its partner, row q XOR 1 of its own, where these
    exist; see :mod:`hiermpi.model.parameters` for the formula.

    Args:
        out: (V, C) The gradient, to which is added.
        table: (V, C) The embeddings, class after class.
        bounds: (S + 1,) The rows at which the classes begin, and V.
        factors: The (n, 1) arrays, one for each class, of the number of neighbours of each row, plus one.
        coupling: The strength of the coupling.
        classes: The numbers of the classes whose rows get a gradient.

    Returns:
        (S,) The share of each of these classes in the loss.
    """
    losses, width = np.zeros(len(factors)), table.shape[1]
    loops = compiled_loops()
    if loops is not None and plain_float32(out, table):
        for index in classes:
            arrays = (out, table, bounds, factors[index])
            numbers = (len(losses), index, width, coupling)
            losses[index] = coupling * loops.pull_together(*map(address_of, arrays), *numbers)
        return losses
    deepest = int(np.diff(bounds).max(initial=0))
    shells = np.zeros((deepest, width), table.dtype)
    for start, stop in pairwise(bounds):
        shells[: stop - start] += table[start:stop]
    for index in classes:
        start, stop = bounds[index : index + 2]
        rows = table[start:stop]
        pull = rows * factors[index]
        pull -= shells[: stop - start]
        even = (stop - start) & ~1  # rows 2i and 2i + 1 are partners; a last odd one has none
        pairs, pulled = rows[:even].reshape(-1, 2, width), pull[:even].reshape(-1, 2, width)
        pulled -= pairs[:, ::-1]
        losses[index] = 0.5 * coupling * float(np.vdot(rows, pull))
        pull *= table.dtype.type(coupling)
        out[start:stop] += pull
    return losses
