"""This module calls the compiled layers: the methods of the numpy specification on C-contiguous float32 arrays."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiermpi.kernels.layers import NO_KEYS, ReferenceKernels, kept_scale, padded
from hiermpi.kernels.library import CONSTANTS, LAYERS, Level, declare
from hiermpi.kernels.memory import address_of, aligned_empty, plain_float32

Array = NDArray[np.float32]

WIDEST = 16
"""The floats in the widest register of any level, for which the memory of packed operands is planned."""
FMA_CHAINS = 12
"""The number of independent multiply-adds in multiply_adds of layers.h."""


class CompiledKernels:
    """The kernels of one instruction set of the compiled library; :class:`ReferenceKernels` describes the methods.

    Args:
        library: The loaded shared object.
        level: The instruction set.
    """

    def __init__(self, library: ctypes.CDLL, level: Level) -> None:
        self.name = level.name
        self.floats = level.floats
        """The number of floats in a register."""
        self._call: dict[str, Callable[..., Any]] = {
            name: declare(library[f"{name}_{level.name}"], signature) for name, signature in LAYERS.items()
        }
        self.scratch = aligned_empty(0, np.float32)
        self._blas = ReferenceKernels()
        self.own_products = level.own_products
        """Whether products are computed here, on one thread, instead of by numpy's BLAS."""

    def product(self, out: Array, a: Array, b: Array, add: bool = False) -> None:
        if not self.own_products:
            self._blas.product(out, a, b, add)
            return
        rows, inner = a.shape
        columns = b.shape[1]
        strides = (out.strides[0] >> 2, a.strides[0] >> 2, a.strides[1] >> 2, b.strides[0] >> 2, b.strides[1] >> 2)
        panel = self._room(product_scratch(inner, 0 if strides[2] % CONSTANTS["PACKED_STRIDE"] else rows))
        arrays = (out, a, b, panel)
        self._call["product"](*map(address_of, arrays), rows, columns, inner, *strides, add)

    def product_gelu(self, out: Array, slope: Array, a: Array, b: Array, bias: Array) -> None:
        if not self.own_products:
            self.product(slope, a, b)
            self.gelu_forward(out, slope, bias)
            return
        inner = a.shape[1]
        arrays = (out, slope, a, b, bias, self._room(product_scratch(inner, 0)))
        self._call["product_gelu"](*map(address_of, arrays), *out.shape, inner)

    def product_slope(self, out: Array, dbias: Array, a: Array, b: Array, slope: Array) -> None:
        if not self.own_products:
            self.product(out, a, b.T)
            self.gelu_backward(out, dbias, slope)
            return
        inner = a.shape[1]
        arrays = (out, dbias, a, b, slope, self._room(product_scratch(inner, 0)))
        self._call["product_slope"](*map(address_of, arrays), *out.shape, inner)

    def embed_forward(self, x: Array, inputs: NDArray[np.int32], wte: Array, wpe: Array) -> None:
        arrays = (x, inputs, wte, wpe)
        self._call["embed_forward"](*map(address_of, arrays), x.shape[0], inputs.shape[1], x.shape[1])

    def embed_backward(self, dwte: Array, dwpe: Array, dx: Array, inputs: NDArray[np.int32]) -> None:
        arrays = (dwte, dwpe, dx, inputs)
        self._call["embed_backward"](*map(address_of, arrays), dx.shape[0], inputs.shape[1], dx.shape[1])

    def norm_forward(self, out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array) -> None:
        arrays = (out, mean, rstd, x, weight, bias)
        self._call["norm_forward"](*map(address_of, arrays), *x.shape)

    def residual_norm_forward(
        self,
        total: Array,
        out: Array,
        mean: Array,
        rstd: Array,
        residual: Array,
        branch: Array,
        branch_bias: Array,
        weight: Array,
        bias: Array,
    ) -> None:
        arrays = (total, out, mean, rstd, residual, branch, branch_bias, weight, bias)
        self._call["residual_norm_forward"](*map(address_of, arrays), *total.shape)

    def norm_backward(
        self,
        dx: Array,
        dweight: Array,
        dbias: Array,
        dbranch: Array | None,
        dout: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        weight: Array,
        fresh: bool,
    ) -> None:
        branch = None if dbranch is None else address_of(dbranch)
        first, rest = map(address_of, (dx, dweight, dbias)), map(address_of, (dout, x, mean, rstd, weight))
        self._call["norm_backward"](*first, branch, *rest, *x.shape, fresh)

    def column_sums(self, dbias: Array, dy: Array) -> None:
        self._call["column_sums"](address_of(dbias), address_of(dy), *dy.shape)

    def gelu_forward(self, out: Array, h: Array, bias: Array) -> None:
        self._call["gelu_forward"](address_of(out), address_of(h), address_of(bias), *h.shape)

    def gelu_backward(self, dh: Array, dbias: Array, slope: Array) -> None:
        self._call["gelu_backward"](address_of(dh), address_of(dbias), address_of(slope), *slope.shape)

    def dropout(self, x: Array, keys: NDArray[np.uint64], threshold: int) -> None:
        count = len(keys)
        self._call["dropout"](address_of(x), address_of(keys), count, x.size // count, threshold, kept_scale(threshold))

    def attention_forward(
        self,
        out: Array,
        p: Array,
        qkv: Array,
        bias: Array,
        shape: Sequence[int],
        keys: NDArray[np.uint64] = NO_KEYS,
        threshold: int = 0,
    ) -> None:
        scratch = self._room(attention_scratch(shape[1], shape[3]))
        arrays = (out, p, qkv, bias, scratch)
        self._call["attention_forward"](*map(address_of, arrays), *shape, *self._dropped(keys, threshold))

    def attention_backward(
        self,
        dqkv: Array,
        dbias: Array,
        dout: Array,
        p: Array,
        qkv: Array,
        bias: Array,
        shape: Sequence[int],
        keys: NDArray[np.uint64] = NO_KEYS,
        threshold: int = 0,
    ) -> None:
        scratch = self._room(attention_scratch(shape[1], shape[3]))
        arrays = (dqkv, dbias, dout, p, qkv, bias, scratch)
        self._call["attention_backward"](*map(address_of, arrays), *shape, *self._dropped(keys, threshold))

    def cross_entropy(self, logits: Array, targets: NDArray[np.int32], gradient: bool) -> float:
        return float(self._call["cross_entropy"](address_of(logits), address_of(targets), *logits.shape, gradient))

    def adamw(
        self,
        arrays: Sequence[Array],
        scale: float,
        beta1: float,
        beta2: float,
        step_size: float,
        root_correction: float,
        eps: float,
        shrink: float,
    ) -> None:
        """Apply AdamW to one run of elements; see :meth:`ReferenceKernels.adamw`."""
        numbers = (scale, beta1, beta2, step_size, root_correction, eps, shrink)
        if not plain_float32(*arrays):
            self._blas.adamw(arrays, *numbers)
            return
        self._call["adamw"](*map(address_of, arrays), len(arrays[0]), *numbers)

    def block_sums(self, sums: NDArray[np.float64], vector: Array, bounds: NDArray[np.int64]) -> None:
        """Compute the sums of squares of blocks; see :meth:`ReferenceKernels.block_sums`."""
        if not plain_float32(vector):
            self._blas.block_sums(sums, vector, bounds)
            return
        self._call["block_sums"](address_of(sums), address_of(vector), address_of(bounds), len(sums))

    def sum_buffers(self, out: Array, buffers: Array, start: int, stop: int) -> None:
        """Sum a part of the buffers; see :meth:`ReferenceKernels.sum_buffers`."""
        name = "sum_integers" if out.dtype == np.int64 else "sum_buffers"
        self._call[name](address_of(out), address_of(buffers), buffers.shape[1], buffers.shape[0], start, stop)

    def add_fixed(self, sums: NDArray[np.int64], x: Array, unit: float, limit: float, fresh: bool) -> bool:
        """Add to sums in fixed point; see :meth:`ReferenceKernels.add_fixed`."""
        return not self._call["add_fixed"](address_of(sums), address_of(x), len(x), 1.0 / unit, limit, fresh)

    def from_fixed(self, out: Array, sums: NDArray[np.int64], unit: float) -> None:
        """Convert sums in fixed point to float32; see :meth:`ReferenceKernels.from_fixed`."""
        self._call["from_fixed"](address_of(out), address_of(sums), len(sums), unit)

    def multiply_adds(self, flops: float) -> None:
        """Do about ``flops`` floating-point operations on registers alone, as fast as this core can do them."""
        self._call["multiply_adds"](round(flops / (2 * FMA_CHAINS * self.floats)))

    def _dropped(self, keys: NDArray[np.uint64], threshold: int) -> tuple[int, int, float]:
        return address_of(keys), threshold, kept_scale(threshold)

    def _room(self, size: int) -> Array:
        if self.scratch.size < size:
            self.scratch = aligned_empty(size, np.float32)
        return self.scratch


def product_scratch(inner: int, packed_rows: int) -> int:
    """Return the float32 elements for a product over ``inner``: a panel, and the rows of a packed left matrix."""
    return inner * (WIDEST * CONSTANTS["PVECS"] + packed_rows)


def attention_scratch(length: int, head: int) -> int:
    """Return the float32 elements that attention over ``length`` tokens needs for a head of ``head`` channels."""
    rows, width = padded(length), padded(head)
    return 8 * rows * width + 2 * rows * rows
