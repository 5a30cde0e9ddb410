"""This module generates text from a model token by token, whatever the family of the model.

A model with a decoder computes the new tokens alone; one that only returns logits computes its whole window again for
every token. Arguments and results are token ids; rows of the model's table are used only inside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.errors import PluginError, UserError, plugin_errors
from hiermpi.model.contract import Batch, Decoder, DecodingModel, LogitsModel


class WindowDecoder:
    """A decoder for a model that only returns logits: it computes the whole window again for every token.

    Args:
        model: The model with its parameters.
        context_length: The most tokens that the model is given.
    """

    def __init__(self, model: LogitsModel, context_length: int) -> None:
        self.model = model
        self.context_length = context_length
        self.window: list[int] = []

    def extend(self, rows: Sequence[int]) -> NDArray[np.floating]:
        """Append rows of the table to the sequence; return the (V,) logits, over rows, of the next one."""
        self.window = [*self.window, *map(int, rows)][-self.context_length :]
        inputs = np.array([self.window], np.int32)
        return self.model.logits(Batch(inputs, inputs, np.zeros(1, np.int64), 0, 0))[0, -1]


def outside_model(model: Any) -> str:
    """Return how messages call a model that is not one of the package's; nothing for one that is."""
    kind = type(model)
    return "" if kind.__module__.partition(".")[0] == "hiermpi" else f"the model {kind.__module__}:{kind.__qualname__}"


class OutsideDecoder:
    """A decoder whose errors, and logits that cannot be, are told in one sentence that names its model.

    Args:
        decoder: The decoder of a model from outside.
        what: How messages call the model.
        vocab_size: The number of logits, V.
    """

    def __init__(self, decoder: Decoder, what: str, vocab_size: int) -> None:
        self.decoder = decoder
        self.what = what
        self.vocab_size = vocab_size

    def extend(self, rows: Sequence[int]) -> NDArray[np.floating]:
        """Append rows of the table; return the (V,) logits, over rows, of the one that follows."""
        with plugin_errors(self.what):
            logits = np.asarray(self.decoder.extend(rows))
        if logits.shape != (self.vocab_size,) or logits.dtype.kind != "f" or not np.isfinite(logits).all():
            raise PluginError(
                f"{self.what}: its logits of a token are {logits.dtype} of shape {logits.shape}: expected finite "
                f"floats of shape {(self.vocab_size,)}"
            )
        return logits


def make_decoder(model: Any, context_length: int) -> Decoder:
    """Make the cheapest decoder that a model allows. Raises UserError where it allows none."""
    if isinstance(model, DecodingModel):
        return model.decoder()
    if isinstance(model, LogitsModel):
        return WindowDecoder(model, context_length)
    raise UserError(
        "this model gives no logits, so it cannot generate text: the model of its family needs a method logits(batch)"
    )


def token_logits(model: Any, tokens: NDArray[np.integer]) -> NDArray[np.floating]:
    """Return the (B, T, V) logits, in token order, of a model for (B, T) token ids."""
    row_of_token = model.parameters.row_of_token
    inputs = np.ascontiguousarray(row_of_token[tokens], np.int32)
    return model.logits(Batch(inputs, inputs, np.zeros(len(inputs), np.int64), 0, 0))[:, :, row_of_token]


@dataclass(frozen=True)
class Sampling:
    """The settings by which the next token is chosen."""

    temperature: float = 1.0
    """The divisor of the logits; with 0 the likeliest token is taken."""
    top_k: int = 0
    """The number of likeliest tokens among which one is chosen; with 0 any token may be."""
    top_p: float = 1.0
    """The probability that the likeliest tokens, among which one is chosen, have together (Holtzman et al., arXiv
    1904.09751)."""


def sample(logits: NDArray[np.floating], generator: np.random.Generator, how: Sampling) -> int:
    """Draw a token id from softmax(logits / temperature), restricted to the likeliest tokens.

    Args:
        logits: (V,) The logits of the tokens.
        generator: The source of randomness.
        how: The temperature and the restrictions.
    """
    if how.temperature == 0.0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")  # likeliest first
    if how.top_k:
        order = order[: how.top_k]
    scaled = logits[order].astype(np.float64) / how.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if how.top_p < 1.0:
        enough = int(np.searchsorted(np.cumsum(weights), how.top_p)) + 1
        order, weights = order[:enough], weights[:enough] / weights[:enough].sum()
    return int(order[generator.choice(len(weights), p=weights)])


def generate(
    model: Any,
    prompt: Sequence[int],
    count: int,
    seed: int,
    how: Sampling,
    context_length: int,
    vocab_size: int = 0,
) -> Iterator[int]:
    """Yield ``count`` token ids that continue ``prompt``.

    Args:
        model: The model with its parameters.
        prompt: Token ids, at least one.
        count: The number of token ids to yield.
        seed: The seed of the choices.
        how: The settings by which tokens are chosen.
        context_length: The most tokens that the model is given.
        vocab_size: The bound below which ids are chosen, where the model's table has spare rows; 0 means all rows.

    Raises:
        UserError: The model returns no logits.
    """
    row_of_token, what = model.parameters.row_of_token, outside_model(model)
    with plugin_errors(what):
        decoder, generator = make_decoder(model, context_length), np.random.default_rng(seed)
    if what:
        decoder = OutsideDecoder(decoder, what, len(row_of_token))
    chosen = row_of_token[: vocab_size or len(row_of_token)]
    logits = decoder.extend(row_of_token[np.asarray(prompt)])
    for index in range(count):
        token = sample(logits[chosen], generator, how)
        yield token
        if index + 1 < count:
            logits = decoder.extend([row_of_token[token]])
