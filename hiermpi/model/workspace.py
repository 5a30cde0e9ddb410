"""This module holds the buffers of a micro-batch: activations that the backward pass needs, and scratch memory.

They are allocated once, at the first batch, or lie in memory that several ranks use one after the other.

Comments use the sizes of :mod:`hiermpi.model.gpt2`.
"""

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.kernels.compiled import attention_scratch, product_scratch
from hiermpi.kernels.layers import padded
from hiermpi.kernels.memory import aligned_empty, round_up

LOGITS_BUFFER_ELEMENTS = 1 << 20
"""The most elements of the buffer of logits, which are computed for as many rows at a time as fit in it."""


def workspace_shapes(config: ModelConfig, sequences: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float buffers that a micro-batch of ``sequences`` needs.

    Buffers that the backward pass needs have the shape (layers, ...), one part for each layer.
    """
    length, width, layers, heads = config.context_length, config.n_embd, config.n_layer, config.n_head
    rows = sequences * length
    logits_rows = max(1, min(rows, LOGITS_BUFFER_ELEMENTS // max(config.vocab_size, 1)))
    return {
        "x": (layers + 1, rows, width),  # the input of each block, and of the last norm
        "middle": (layers, rows, width),
        "norm1": (layers + 1, rows, width),
        "norm2": (layers, rows, width),
        "mean": (2 * layers + 1, rows),
        "rstd": (2 * layers + 1, rows),
        "qkv": (layers, rows, 3 * width),
        "p": (layers, sequences, heads, padded(length), padded(length)),
        "heads": (layers, rows, width),
        "active": (layers, rows, 4 * width),
        "slope": (layers, rows, 4 * width),  # the slope of GELU where it was applied
        "branch": (rows, width),
        "wide": (rows, 4 * width),
        "dx": (rows, width),
        "dropped": (rows if config.dropout else 0, width),
        "logits": (logits_rows, config.vocab_size),
        "scratch": (scratch_elements(config, rows, logits_rows),),
    }


def scratch_elements(config: ModelConfig, rows: int, logits_rows: int) -> int:
    """Return the elements that compiled kernels need: a panel and a packed matrix of a product, or a head of attention.

    Args:
        config: The settings, with the vocabulary size resolved.
        rows: The rows of a micro-batch.
        logits_rows: The rows for which logits are computed at once.
    """
    widest, head = 4 * config.n_embd, config.n_embd // config.n_head
    return max(
        product_scratch(rows, widest),
        product_scratch(logits_rows, config.vocab_size),
        product_scratch(max(widest, config.vocab_size), 0),
        attention_scratch(config.context_length, head),
    )


def activation_bytes(config: ModelConfig, sequences: int) -> int:
    """Return the bytes of the buffers with which a leaf computes ``sequences`` sequences at once."""
    shapes = workspace_shapes(config, sequences)
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


class Workspace:
    """The buffers for micro-batches of any size up to some number of sequences.

    Args:
        config: The settings, with the vocabulary size resolved.
        dtype: The element type.
        memory: Zeroed memory of :meth:`elements` for ``sequences``; with None, memory is allocated as batches need it.
        sequences: The number of sequences for which there is ``memory``.
    """

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, memory: NDArray | None = None, sequences: int = 0
    ) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self.buffers: dict[str, NDArray] = {}
        """The views into the buffers for the current micro-batch."""
        self._whole: dict[str, NDArray] = {}
        """The buffers at their full size; there are none before the first batch, so a rank that never computes pays
        nothing."""
        self._size = 0
        self._shape_in_use = (0, 0)
        if memory is not None:
            self._lay_out(memory, sequences)

    @staticmethod
    def elements(config: ModelConfig, sequences: int) -> int:
        """Return how many elements of memory a workspace for ``sequences`` sequences needs."""
        return sum(round_up(4 * int(np.prod(shape))) // 4 for shape in workspace_shapes(config, sequences).values())

    def reserve(self, sequences: int, length: int) -> dict[str, NDArray]:
        """Return the buffers for a micro-batch of this size.

        Args:
            sequences: The number of sequences, B.
            length: The tokens of each, T.

        Raises:
            ValueError: A sequence has more tokens than the model takes.
        """
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens do not fit model.context_length = {self.config.context_length}")
        if sequences > self._size:
            memory = aligned_empty(self.elements(self.config, sequences), self.dtype)
            memory[:] = 0  # pages are touched here, not in the first step; padding stays zero
            self._lay_out(memory, sequences)
        if self._shape_in_use == (sequences, length):
            return self.buffers
        rows = sequences * length
        views: dict[str, NDArray] = {}
        for name, whole in self._whole.items():
            if name == "p":
                size = padded(length)
                count = sequences * self.config.n_head * size * size
                views[name] = whole.reshape(len(whole), -1)[:, :count].reshape(
                    len(whole), sequences, self.config.n_head, size, size
                )
            elif name in ("logits", "scratch"):
                views[name] = whole
            elif name in ("branch", "wide", "dx", "dropped"):
                views[name] = whole[:rows]
            else:
                views[name] = whole[:, :rows]
        views["dqkv"] = views["wide"].reshape(-1)[: rows * 3 * self.config.n_embd].reshape(rows, -1)
        self.buffers, self._shape_in_use = views, (sequences, length)
        return views

    def _lay_out(self, memory: NDArray, sequences: int) -> None:
        self._whole, start = {}, 0
        for name, shape in workspace_shapes(self.config, sequences).items():
            size = int(np.prod(shape))
            self._whole[name] = memory[start : start + size].reshape(shape)
            start += round_up(4 * size) // 4
        self._size, self._shape_in_use = sequences, (0, 0)
