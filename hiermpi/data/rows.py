"""A batch as it travels: one int32 row per sequence.

A row is the sequence id (two columns hold an int64), then the sequence's T + 1 tokens; -1 is padding.
"""

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.sampling import Draw
from hiermpi.kernels.loops import compiled_loops
from hiermpi.kernels.memory import address_of

ID_COLUMNS = 2
MOST_BINS = 256
"""Of loops.c."""


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


class RowReader:
    """Reads batches of a split that lies in memory: tokens to rows and counts in one pass.

    Args:
        tokens: (n,) token ids of the split, uint16 or uint32.
        length: tokens of a sequence, T + 1.
        row_of_token: (V,) row of the model's table for each token id.
        group_of_token: (V,) group of each token id.
        n_bins: of the counts, more than any group.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        length: int,
        row_of_token: NDArray[np.int32],
        group_of_token: NDArray[np.uint8],
        n_bins: int,
    ) -> None:
        self.tokens = np.ascontiguousarray(tokens)
        self.length = length
        self.row_of_token = row_of_token
        self.group_of_token = group_of_token
        self.n_bins = n_bins
        self._made = [np.empty((0, 0), np.int32)] * 2

    def read(self, drawn: Draw) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(B, 2 + T + 1) rows of a batch, and the (B, bins) counts of the groups of all tokens but the last of each.

        The rows are written again by the call after the next.
        """
        n, length = len(drawn.starts), self.length
        loops = compiled_loops()
        if loops is None or self.n_bins > MOST_BINS:
            tokens = np.lib.stride_tricks.sliding_window_view(self.tokens, length)[drawn.starts]
            cell = self.n_bins * np.arange(n)[:, None] + self.group_of_token[tokens[:, :-1]]
            counts = np.bincount(cell.reshape(-1), minlength=n * self.n_bins).astype(np.int32)
            return pack_rows(drawn.sequence_ids, self.row_of_token[tokens]), counts.reshape(n, self.n_bins)
        rows, counts = self._room(n), np.empty((n, self.n_bins), np.int32)
        arrays = (rows, counts, self.tokens, drawn.sequence_ids, drawn.starts, self.row_of_token, self.group_of_token)
        read = loops.read_rows16 if self.tokens.dtype == np.uint16 else loops.read_rows32
        read(*map(address_of, arrays), n, length, self.n_bins)
        return rows, counts

    def _room(self, n: int) -> NDArray[np.int32]:
        """Memory for rows: new pages for each batch would cost more than what is written to them."""
        self._made.reverse()
        if len(self._made[0]) < n:
            self._made[0] = np.empty((n, ID_COLUMNS + self.length), np.int32)
        return self._made[0][:n]
