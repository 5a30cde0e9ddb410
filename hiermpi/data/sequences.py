"""This module draws the sequences that a step sees, and packs them into the records that are sent between ranks.

Which sequences a step sees is a pure function of (seed, cursor), so that any rank count and any resume agree. The
cursor counts the sequences drawn since the first step. Each epoch is one permutation of the split's windows, a
function of (seed, epoch) only; batches cross epoch ends. The windows of an epoch start at a random offset below the
context length, so that over the epochs no token is always the first of its context.

A sequence travels as one int32 record: its id (two columns hold an int64), then the rows of its T + 1 tokens in the
model's table; -1 is padding.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.loops import ID_COLUMNS, read_records


class Draw(NamedTuple):
    """The sequences of one batch."""

    sequence_ids: NDArray[np.int64]
    """(B,) The number of each window within its epoch, in the order of the text."""
    starts: NDArray[np.int64]
    """(B,) The position in the split of each window's first token."""


class Sampler:
    """A sampler draws batches from a split of ``n_tokens`` tokens.

    Args:
        n_tokens: The length of the split.
        context_length: The tokens per sequence, T; a window has T + 1 tokens, of which the last is only a target.
        seed: The seed of the permutations.

    Raises:
        ValueError: The split is shorter than one window.
    """

    def __init__(self, n_tokens: int, context_length: int, seed: int) -> None:
        if n_tokens < context_length + 1:
            raise ValueError(
                f"{n_tokens} tokens are fewer than the {context_length + 1} that one sequence needs "
                f"(model.context_length = {context_length}): use more text or a shorter context"
            )
        self.n_tokens = n_tokens
        self.context_length = context_length
        self.seed = seed
        self.n_sequences = max(1, (n_tokens - context_length) // context_length)
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._offset = 0

    def draw(self, cursor: int, batch_size: int) -> Draw:
        """Return the ``batch_size`` sequences from ``cursor`` on."""
        ids, starts = [], []
        while batch_size:
            epoch, position = divmod(cursor, self.n_sequences)
            self._enter(epoch)
            part = self._order[position : position + batch_size]
            ids.append(part)
            starts.append(self._offset + part * self.context_length)
            cursor += len(part)
            batch_size -= len(part)
        if len(ids) == 1:
            return Draw(ids[0], starts[0])
        return Draw(np.concatenate(ids), np.concatenate(starts))

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            largest = min(self.context_length - 1, self.n_tokens - 1 - self.n_sequences * self.context_length)
            self._offset = int(generator.integers(0, largest, endpoint=True))
            self._order = generator.permutation(self.n_sequences)
            self._epoch = epoch


class Windows(NamedTuple):
    """The windows over which a split is evaluated, of which the last one may be shorter."""

    starts: NDArray[np.int64]
    """(n,) The position in the split of each window's first token."""
    lengths: NDArray[np.int64]
    """(n,) The number of targets in each window."""


def evaluation_windows(n_tokens: int, context_length: int, limit: int = 0) -> Windows:
    """Return the windows over which a split is evaluated.

    Args:
        n_tokens: The length of the split, at least 2.
        context_length: The targets per window, T.
        limit: The most windows that are returned; beyond it, full windows evenly spaced over the split are kept. With 0
            the windows cover every target of the split exactly once.
    """
    starts = np.arange(0, n_tokens - 1, context_length)
    lengths = np.minimum(context_length, n_tokens - 1 - starts)
    full = int((lengths == context_length).sum())
    if limit and full > limit:
        keep = np.arange(limit) * full // limit
        return Windows(starts[keep], lengths[keep])
    return Windows(starts, lengths)


def pack_records(sequence_ids: NDArray[np.int64], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Make the (B, 2 + T) records of a batch from its (B,) sequence ids and (B, T) rows of tokens."""
    records = np.empty((len(tokens), ID_COLUMNS + tokens.shape[1]), np.int32)
    records[:, :ID_COLUMNS] = np.ascontiguousarray(sequence_ids, np.int64).view(np.int32).reshape(-1, ID_COLUMNS)
    records[:, ID_COLUMNS:] = tokens
    return records


def unpack_records(records: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the (B,) sequence ids and (B, T) rows of tokens of a batch's records."""
    ids = np.ascontiguousarray(records[:, :ID_COLUMNS]).view(np.int64)[:, 0]
    return ids, records[:, ID_COLUMNS:]


class RecordReader:
    """A record reader makes records and counts of a split that lies in memory, in one pass over the tokens.

    Args:
        tokens: (n,) The token ids of the split, uint16 or uint32.
        length: The tokens of a sequence, T + 1.
        row_of_token: (V,) The row of the model's table for each token id.
        group_of_token: (V,) The group of ranks of each token id.
        n_bins: The number of bins of the counts, larger than any group.
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
        """Return the (B, 2 + T + 1) records of a batch, and the (B, bins) counts of its input tokens.

        The last token of a sequence is not counted. The call after the next one overwrites the records.
        """
        records = self._room(len(drawn.starts))
        tables = (self.row_of_token, self.group_of_token, self.n_bins)
        return records, read_records(records, self.tokens, drawn.sequence_ids, drawn.starts, *tables)

    def _room(self, n: int) -> NDArray[np.int32]:
        """Return memory for ``n`` records.

        It is reused, as new pages for each batch would cost more than what is written to them.
        """
        self._made.reverse()
        if len(self._made[0]) < n:
            self._made[0] = np.empty((n, ID_COLUMNS + self.length), np.int32)
        return self._made[0][:n]
