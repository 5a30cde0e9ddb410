"""The token table in class-major order: each symmetry class is one contiguous slice of rows.

The model works on row ids; token ids are mapped at the data boundary. Checkpoints, exports and logits are in token
order.
"""

import numpy as np
from numpy.typing import NDArray


def symmetry_groups(known: NDArray[np.uint8] | None, vocab_size: int, symmetry_order: int) -> NDArray[np.uint8]:
    """(V,) class of each row of a table; ids beyond the ``known`` ones go by id modulo the order."""
    groups = (np.arange(vocab_size) % symmetry_order).astype(np.uint8)
    if known is not None:
        groups[: len(known)] = known[:vocab_size]
    return groups


class SymmetryTable:
    """The permutation between token ids and rows.

    Args:
        groups: (V,) symmetry class of each token id.
        symmetry_order: number of classes, S.

    Attributes:
        token_of_row: (V,) token id of each row: sorted by class, then by id.
        row_of_token: (V,) row of each token id.
        class_bounds: (S + 1,) rows at which the classes begin, and V.
    """

    def __init__(self, groups: NDArray[np.uint8], symmetry_order: int) -> None:
        if len(groups) and groups.max() >= symmetry_order:
            raise ValueError(f"symmetry class {groups.max()} does not exist in a symmetry of order {symmetry_order}")
        self.token_of_row = np.argsort(groups, kind="stable")
        self.row_of_token = np.empty_like(self.token_of_row)
        self.row_of_token[self.token_of_row] = np.arange(len(groups))
        counts = np.bincount(groups, minlength=symmetry_order)
        self.class_bounds = np.concatenate([[0], np.cumsum(counts)])
