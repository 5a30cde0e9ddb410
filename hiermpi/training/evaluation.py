"""Mean loss over a split."""

from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.model.contract import Model
from hiermpi.optimizer.sums import rounded_loss
from hiermpi.training.batches import EvaluationSource, rows_to_batch

EVALUATION_UNIT = 8
"""Windows that are computed together, whatever the number of ranks."""


class Evaluation(NamedTuple):
    """The result over a split."""

    loss: float
    """Mean over tokens, in nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), capped where a float ends."""
        return exp(min(self.loss, 700.0))

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Bits that the model needs for a byte of the text."""
        return self.loss / log(2.0) * tokens_per_byte


def loss_in_units(model: Model, rows: NDArray[np.int32]) -> tuple[float, int]:
    """The loss sum and the targets of some windows, unit by unit: the same bits whoever computes which unit."""
    loss, tokens = 0.0, 0
    for first in range(0, len(rows), EVALUATION_UNIT):
        part = model.loss(rows_to_batch(rows[first : first + EVALUATION_UNIT], 0, 0))
        loss, tokens = loss + rounded_loss(part[0]), tokens + part[1]
    return loss, tokens


def evaluate_alone(model: Model, source: EvaluationSource) -> Evaluation:
    """The mean loss over ``source``, computed by this process."""
    loss, tokens = 0.0, 0
    for first in range(0, len(source), EVALUATION_UNIT):
        part = loss_in_units(model, source.rows(first, min(first + EVALUATION_UNIT, len(source))))
        loss, tokens = loss + part[0], tokens + part[1]
    return Evaluation(loss / max(tokens, 1), tokens)
