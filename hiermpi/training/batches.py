"""The root's side of a batch: draw, read, route, map to rows; and a leaf's side: rows to micro-batches."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiermpi.data.sequences import Draw, RecordReader, Sampler, evaluation_windows, pack_records, unpack_records
from hiermpi.hierarchy.routing import Router
from hiermpi.kernels.loops import Dealt
from hiermpi.model.contract import IGNORED_TARGET, Batch

LEARNED_FROM = 512
"""Units, at most, that the router learns from."""


class TokenSource(Protocol):
    """What a batch source needs of a dataset."""

    def length(self, split: str) -> int:
        """Tokens in ``split``."""

    def read(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """(len(starts), length) token ids of ``split``."""


@runtime_checkable
class KeptTokens(Protocol):
    """A dataset that may hold a split in memory."""

    def in_memory(self, split: str) -> NDArray[np.unsignedinteger] | None:
        """All token ids of ``split`` as they are stored; None where they are on disk."""


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is ready to leave the root."""

    cursor: int
    """Of the sampler, before this batch."""
    next_cursor: int
    records: NDArray[np.int32]
    dealt: Dealt


class BatchSource:
    """Prepares the batches of a training run, one ahead. Has the router look at some sequences first.

    Args:
        tokens: the dataset.
        sampler: which sequences come when.
        router: which leaf computes them.
        row_of_token: (V,) row of the model's table for each token id.
        batch_size: sequences per batch.
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
        """The batch at ``cursor``; at once if :meth:`prepare` was called for it."""
        self.prepare(cursor)
        assert self._ready is not None
        return self._ready

    def prepare(self, cursor: int) -> None:
        """Have the batch at ``cursor`` ready."""
        if self._ready is not None and self._ready.cursor == cursor:
            return
        records, counts = self._read(self.sampler.draw(cursor, self.batch_size))
        self._ready = PreparedBatch(cursor, cursor + len(records), records, self.router.route_counts(counts))

    def _read(self, drawn: Draw) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The rows of a batch, and the router's counts; see :meth:`RecordReader.read`."""
        if self._reader is not None:
            return self._reader.read(drawn)
        tokens = self.tokens.read("train", drawn.starts, self._length)
        return pack_records(drawn.sequence_ids, self.row_of_token[tokens]), self.router.counts(tokens[:, :-1])

    def _first_counts(self) -> NDArray[np.int32]:
        """The router's counts of sequences that are the same in every run on this data, resumed ones included."""
        unit = self.router.unit_size
        end, at_once = min(LEARNED_FROM * unit, self.sampler.n_sequences), max(self.batch_size // unit, 1) * unit
        drawn = (self.sampler.draw(first, min(at_once, end - first)) for first in range(0, end, at_once))
        return np.concatenate([self._read(some)[1] for some in drawn])


class EvaluationSource:
    """The windows over which a split is evaluated, as rows.

    Args:
        tokens: the dataset.
        split: ``train`` or ``val``.
        context_length: targets per window, T.
        row_of_token: (V,) row of the model's table for each token id.
        limit: most windows; 0 covers the whole split.
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
        """(last - first, 2 + T + 1) rows of windows ``first`` to ``last``, padded with -1."""
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
    """The model's view of the rows that a leaf received; entries below 0 become ignored targets."""
    ids, tokens = unpack_records(records)
    targets = np.where(tokens[:, 1:] < 0, IGNORED_TARGET, tokens[:, 1:])
    return Batch(np.maximum(tokens[:, :-1], 0), targets, ids, seed, step)
