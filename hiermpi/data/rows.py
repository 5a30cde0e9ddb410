"""A batch as it travels: one int32 row per sequence.

A row is the sequence id (two columns hold an int64), then the sequence's T + 1 tokens; -1 is padding.
"""

import numpy as np
from numpy.typing import NDArray

ID_COLUMNS = 2


def pack_rows(sequence_ids: NDArray[np.int64], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """(B, 2 + T) rows of a batch from its (B,) sequence ids and (B, T) tokens."""
    rows = np.empty((len(tokens), ID_COLUMNS + tokens.shape[1]), np.int32)
    rows[:, :ID_COLUMNS] = np.ascontiguousarray(sequence_ids, np.int64).view(np.int32).reshape(-1, ID_COLUMNS)
    rows[:, ID_COLUMNS:] = tokens
    return rows


def unpack_rows(rows: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The (B,) sequence ids and (B, T) tokens of a batch's rows."""
    ids = np.ascontiguousarray(rows[:, :ID_COLUMNS]).view(np.int64)[:, 0]
    return ids, rows[:, ID_COLUMNS:]
