"""Mean loss over a split."""

from math import exp, log
from typing import NamedTuple

from hiermpi.model.contract import Model
from hiermpi.training.batches import EvaluationSource, rows_to_batch


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


def evaluate_alone(model: Model, source: EvaluationSource, batch_size: int = 32) -> Evaluation:
    """The mean loss over ``source``, computed by this process."""
    loss, tokens = 0.0, 0
    for first in range(0, len(source), batch_size):
        last = min(first + batch_size, len(source))
        part = model.loss(rows_to_batch(source.rows(first, last), 0, 0))
        loss, tokens = loss + part[0], tokens + part[1]
    return Evaluation(loss / max(tokens, 1), tokens)
