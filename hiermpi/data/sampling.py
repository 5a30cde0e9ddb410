"""Which sequences a step sees: a pure function of (seed, cursor), so that any rank count and any resume agree.

The cursor counts the sequences drawn since the first step. Each epoch is one permutation of the split's windows,
a function of (seed, epoch) only; batches cross epoch ends. The windows of an epoch start at a random offset below
the context length, so that over the epochs no token is always the first of its context.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draw(NamedTuple):
    """The sequences of one batch."""

    sequence_ids: NDArray[np.int64]
    """(B,) window number within its epoch's permutation."""
    starts: NDArray[np.int64]
    """(B,) position in the split of each window's first token."""


class Sampler:
    """Draws batches from a split of ``n_tokens`` tokens.

    Args:
        n_tokens: length of the split.
        context_length: tokens per sequence, T; a window has T + 1 tokens, the last being only a target.
        seed: seed of the permutations.

    Raises:
        ValueError: the split is shorter than one window.
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
        """The ``batch_size`` sequences from ``cursor`` on."""
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
    """Consecutive windows that cover a split, the last one possibly shorter."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Targets in each window."""


def evaluation_windows(n_tokens: int, context_length: int, limit: int = 0) -> Windows:
    """Windows over which a split is evaluated.

    Args:
        n_tokens: length of the split, at least 2.
        context_length: targets per window, T.
        limit: 0 covers every target of the split exactly once; otherwise at most this many full windows, evenly
            spaced over the split.
    """
    starts = np.arange(0, n_tokens - 1, context_length)
    lengths = np.minimum(context_length, n_tokens - 1 - starts)
    full = int((lengths == context_length).sum())
    if limit and full > limit:
        keep = np.arange(limit) * full // limit
        return Windows(starts[keep], lengths[keep])
    return Windows(starts, lengths)
