"""What the trainer asks of a model, and nothing more: bring your own by satisfying :class:`Model`."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiermpi.model.parameters import ParameterBuffer

IGNORED_TARGET = -1
"""A target that counts for nothing: it is not in the loss, nor in the number of tokens."""


class Batch(NamedTuple):
    """The sequences one leaf computes at once."""

    inputs: NDArray[np.int32]
    """(B, T) rows of the token table."""
    targets: NDArray[np.int32]
    """(B, T) rows of the token table; :data:`IGNORED_TARGET` where there is nothing to predict."""
    sequence_ids: NDArray[np.int64]
    """(B,) identity of each sequence within the data: with ``seed`` and ``step`` it keys all randomness."""
    seed: int
    step: int


class Model(Protocol):
    """A model that can be trained on the hierarchy."""

    parameters: ParameterBuffer
    """A step may leave them in another slot: take the tensors from here for every batch."""
    symmetry_order: int

    def loss(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses over the batch's targets, in nats, and the number of targets. No dropout."""

    def loss_and_gradients(self, batch: Batch, gradients: NDArray[np.float32]) -> tuple[float, int]:
        """Add the batch's gradient SUM into ``gradients``; return (loss_sum, n_tokens)."""


@runtime_checkable
class WritingModel(Model, Protocol):
    """A model that can save a pass over the gradients; no model must."""

    def write_gradients(self, batch: Batch, gradients: NDArray[np.float32]) -> tuple[float, int]:
        """The same as :meth:`loss_and_gradients` on zeroed ``gradients``, whatever they hold (zeros as padding)."""
