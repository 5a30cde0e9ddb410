"""The root draws, reads and routes batches and maps them to rows; a leaf makes micro-batches of its rows."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.sequences import Draw, RecordReader, Sampler, evaluation_windows, pack_records, unpack_records
from hiermpi.hierarchy.routing import Router
from hiermpi.kernels.loops import Dealt
from hiermpi.model.contract import IGNORED_TARGET, Batch

LEARNED_FROM = 512
"""The largest number of units from which the router learns."""


class TokenSource(Protocol):
    """The methods of a dataset that a batch source needs."""

    def length(self, split: str) -> int:
        """Return the number of tokens in ``split``."""

    def read(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """Read token ids of a split, as (len(starts), length).

        Args:
            split: The name of the split.
            starts: The index of the first token of each sequence.
            length: The number of tokens in a sequence.
        """


@runtime_checkable
class KeptTokens(Protocol):
    """A dataset that may hold a split in memory."""

    def in_memory(self, split: str) -> NDArray[np.unsignedinteger] | None:
        """Return all token ids of ``split`` as they are stored, or None where they are on disk."""


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is ready to leave the root."""

    cursor: int
    """The sampler's cursor before this batch."""
    next_cursor: int
    records: NDArray[np.int32]
    dealt: Dealt


class BatchSource:
    """A source that prepares the batches of a training run one ahead. The router first learns from some sequences.

    Args:
        tokens: The dataset.
        sampler: The sampler, which decides which sequences come when.
        router: The router, which decides which leaf computes them.
        row_of_token: (V,) The row of the model's table for each token id.
        batch_size: The number of sequences per batch.
    """

    def __init__(
        self,
        tokens: TokenSource,
        sampler: Sampler,
        router: Router,
        row_of_token: NDArray[np.integer],
        batch_size: int,
    ) -> None:
        self.tokens = tokens
        self.sampler = sampler
        self.router = router
        self.row_of_token = row_of_token.astype(np.int32)
        self.batch_size = batch_size
        self._ready: PreparedBatch | None = None
        kept = tokens.in_memory("train") if isinstance(tokens, KeptTokens) else None
        self._reader, self._length = None, sampler.context_length + 1
        if kept is not None:
            self._reader = RecordReader(kept, self._length, self.row_of_token, router.group_of_token, router.n_bins)
        if router.learns:
            router.learn(self._first_counts())

    def take(self, cursor: int) -> PreparedBatch:
        """Return the batch at ``cursor``, at once if :meth:`prepare` was called for it."""
        self.prepare(cursor)
        assert self._ready is not None
        return self._ready

    def prepare(self, cursor: int) -> None:
        """Prepare the batch at ``cursor``, unless it is ready."""
        if self._ready is not None and self._ready.cursor == cursor:
            return
        records, counts = self._read(self.sampler.draw(cursor, self.batch_size))
        self._ready = PreparedBatch(cursor, cursor + len(records), records, self.router.route_counts(counts))

    def _read(self, drawn: Draw) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Read the rows of a batch, and the router's counts of them; see :meth:`RecordReader.read`."""
        if self._reader is not None:
            return self._reader.read(drawn)
        tokens = self.tokens.read("train", drawn.starts, self._length)
        return pack_records(drawn.sequence_ids, self.row_of_token[tokens]), self.router.counts(tokens[:, :-1])

    def _first_counts(self) -> NDArray[np.int32]:
        """Return the router's counts of sequences that are the same in every run on this data, also after a resume."""
        unit = self.router.unit_size
        end, at_once = min(LEARNED_FROM * unit, self.sampler.n_sequences), max(self.batch_size // unit, 1) * unit
        drawn = (self.sampler.draw(first, min(at_once, end - first)) for first in range(0, end, at_once))
        return np.concatenate([self._read(some)[1] for some in drawn])


class EvaluationSource:
    """A source of the windows over which a split is evaluated, as rows.

    Args:
        tokens: The dataset.
        split: The name of the split, ``train`` or ``val``.
        context_length: The number of targets per window, T.
        row_of_token: (V,) The row of the model's table for each token id.
        limit: The largest number of windows; 0 covers the whole split.
    """

    def __init__(
        self,
        tokens: TokenSource,
        split: str,
        context_length: int,
        row_of_token: NDArray[np.integer],
        limit: int = 0,
    ) -> None:
        self.tokens = tokens
        self.split = split
        self.context_length = context_length
        self.row_of_token = row_of_token.astype(np.int32)
        self.windows = evaluation_windows(tokens.length(split), context_length, limit)

    def __len__(self) -> int:
        return len(self.windows.starts)

    def records(self, first: int, last: int) -> NDArray[np.int32]:
        """Return the (last - first, 2 + T + 1) rows of windows ``first`` to ``last``, padded with -1."""
        starts, lengths = self.windows.starts[first:last], self.windows.lengths[first:last]
        tokens = np.full((len(starts), self.context_length + 1), -1, np.int32)
        full = lengths == self.context_length
        if full.any():
            tokens[full] = self.row_of_token[self.tokens.read(self.split, starts[full], self.context_length + 1)]
        for index in np.flatnonzero(~full):
            length = int(lengths[index]) + 1
            tokens[index, :length] = self.row_of_token[self.tokens.read(self.split, starts[index : index + 1], length)]
        return pack_records(np.arange(first, first + len(starts)), tokens)


def records_to_batch(records: NDArray[np.int32], seed: int, step: int) -> Batch:
    """Make the model's batch from the rows that a leaf received; entries below 0 become ignored targets.

    Args:
        records: The rows.
        seed: The seed of the run.
        step: The number of finished steps.
    """
    ids, tokens = unpack_records(records)
    targets = np.where(tokens[:, 1:] < 0, IGNORED_TARGET, tokens[:, 1:])
    return Batch(np.maximum(tokens[:, :-1], 0), targets, ids, seed, step)
