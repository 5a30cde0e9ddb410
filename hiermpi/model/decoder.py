"""Token by token generation with cached keys and values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.layers import ReferenceKernels
from hiermpi.model.transformer import Transformer

_KERNELS = ReferenceKernels()


class Decoder:
    """Extends one sequence by some tokens at a time, at the cost of the new ones.

    Positions are absolute, so past the context the cache does not fit the slid window any more and is rebuilt: the
    logits are those of a forward pass over the last ``context_length`` tokens, always.

    Args:
        model: with its parameters.
    """

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.model = model
        self.window: list[int] = []
        """Token ids that the next one is predicted from."""
        shape = (config.n_layer, 2, config.n_head, config.context_length, config.n_embd // config.n_head)
        self._cache = np.zeros(shape, model.parameters.dtype)
        self._head = model.output_weight()[model.symmetry.row_of_token]

    def extend(self, tokens: Sequence[int]) -> NDArray[np.floating]:
        """Append token ids; return the (V,) logits of the one that follows, in token order."""
        context = self.model.config.context_length
        kept = len(self.window)
        self.window = [*self.window, *tokens]
        if len(self.window) > context:
            self.window = self.window[-context:]
            kept = 0
        return self._forward(np.asarray(self.window[kept:]), kept)

    def _forward(self, tokens: NDArray[np.integer], start: int) -> NDArray[np.floating]:
        """The logits after ``tokens``, which stand at positions ``start`` and on."""
        model, p = self.model, self.model.parameters
        stop = start + len(tokens)
        x = p["wte.weight"][model.symmetry.row_of_token[tokens]] + p["wpe.weight"][start:stop]
        for layer in range(model.config.n_layer):
            name = f"h.{layer}."
            x = x + self._attention(layer, self._norm(x, name + "ln_1"), start, stop)
            hidden = self._norm(x, name + "ln_2") @ p[name + "mlp.c_fc.weight"]
            active = np.empty_like(hidden)
            _KERNELS.gelu_forward(active, hidden, p[name + "mlp.c_fc.bias"])
            x = x + active @ p[name + "mlp.c_proj.weight"] + p[name + "mlp.c_proj.bias"]
        return self._head @ self._norm(x[-1:], "ln_f")[0]

    def _attention(self, layer: int, x: NDArray, start: int, stop: int) -> NDArray:
        p, name = self.model.parameters, f"h.{layer}.attn."
        heads, width = self._cache.shape[2], self._cache.shape[4]
        qkv = x @ p[name + "c_attn.weight"] + p[name + "c_attn.bias"]
        q, k, v = qkv.reshape(len(x), 3, heads, width).transpose(1, 2, 0, 3)  # (H, new, D) each
        self._cache[layer, 0, :, start:stop], self._cache[layer, 1, :, start:stop] = k, v
        keys, values = self._cache[layer, :, :, :stop]
        scores = np.matmul(q, keys.swapaxes(1, 2)) / np.sqrt(width).astype(x.dtype)
        future = np.arange(stop) > np.arange(start, stop)[:, None]
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        scores /= scores.sum(axis=2, keepdims=True)
        mixed = np.matmul(scores, values).swapaxes(0, 1).reshape(len(x), -1)
        return mixed @ p[name + "c_proj.weight"] + p[name + "c_proj.bias"]

    def _norm(self, x: NDArray, name: str) -> NDArray:
        p, out = self.model.parameters, np.empty_like(x)
        mean, rstd = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
        _KERNELS.norm_forward(out, mean, rstd, x, p[f"{name}.weight"], p[f"{name}.bias"])
        return out


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only among the k likeliest; 0 among all."""
    top_p: float = 1.0
    """Only among the likeliest that together have this probability (Holtzman et al., arXiv 1904.09751)."""


def sample(logits: NDArray[np.floating], generator: np.random.Generator, how: Sampling) -> int:
    """A token id drawn from softmax(logits / temperature), cut to the likeliest.

    Args:
        logits: (V,).
        generator: source of randomness.
        how: temperature and cuts.
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
    model: Transformer, prompt: Sequence[int], count: int, seed: int, how: Sampling, vocab_size: int = 0
) -> Iterator[int]:
    """Yield ``count`` token ids that continue ``prompt`` (at least one token id).

    Args:
        model: with its parameters.
        prompt: token ids.
        count: of new ones.
        seed: of the choices.
        how: they are made.
        vocab_size: only ids below it, where the model's table has spare rows; 0 takes all.
    """
    decoder, generator = Decoder(model), np.random.default_rng(seed)
    vocab_size = vocab_size or model.config.vocab_size
    logits = decoder.extend(prompt)
    for index in range(count):
        token = sample(logits[:vocab_size], generator, how)
        yield token
        if index + 1 < count:
            logits = decoder.extend([token])
