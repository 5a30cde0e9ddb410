"""The layers in plain numpy: the specification that every faster path must agree with.

Functions on arrays, no hidden state. Gradients have a ``d`` in front. Rows N = B * T, channels C, heads H of size
D = C / H, vocabulary V; any floating dtype. Outputs are written into arrays that the caller gives.
"""

from collections.abc import Sequence
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
NORM_EPSILON = 1e-5
GELU_SCALE = sqrt(2.0 / pi)
GELU_CUBIC = 0.044715
SUM_PIECE = 1 << 14
"""Elements summed over all buffers at a time: they stay in the cache."""

ADAMW_BLOCK = 1 << 15
"""Elements of a pass of AdamW: small enough that its temporaries stay in the cache."""

NO_KEYS = np.zeros(0, np.uint64)


def padded(n: int) -> int:
    """``n`` rounded up to 16: the layout of kept attention probabilities."""
    return -(-n // 16) * 16


class ReferenceKernels:
    """The kernels in numpy."""

    name = "numpy"
    floats = 0
    """Floats in a register; not known here."""

    def __init__(self) -> None:
        self._products = np.empty(0)
        self.scratch: Array = np.empty(0)
        """Room that compiled kernels pack operands into; they take more where it is too small."""
        self.own_products = False

    def product(self, out: Array, a: Array, b: Array, add: bool = False) -> None:
        """Out (M, N) = a (M, K) b (K, N), or added to out; a and b are C-contiguous or transposes of such."""
        if not add:
            np.matmul(a, b, out=out)
            return
        if self._products.size < out.size or self._products.dtype != out.dtype:
            self._products = np.empty(out.size, out.dtype)
        product = self._products[: out.size].reshape(out.shape)
        np.matmul(a, b, out=product)
        out += product

    def embed_forward(self, x: Array, inputs: NDArray[np.int32], wte: Array, wpe: Array) -> None:
        """X (N, C) = wte[inputs] + wpe[position]; inputs (B, T) rows of wte (V, C); wpe (>= T, C)."""
        batch, length = inputs.shape
        np.take(wte, inputs.reshape(-1), axis=0, out=x)
        x.reshape(batch, length, -1)[...] += wpe[:length]

    def embed_backward(self, dwte: Array, dwpe: Array, dx: Array, inputs: NDArray[np.int32]) -> None:
        """dwte[inputs] += dx, in the order of the rows; dwpe[position] += dx."""
        batch, length = inputs.shape
        np.add.at(dwte, inputs.reshape(-1), dx)
        dwpe[:length] += dx.reshape(batch, length, -1).sum(axis=0)

    def norm_forward(self, out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array) -> None:
        """Layer norm of the rows of x (N, C) (Ba, Kiros, Hinton 2016); mean, rstd (N,) are kept for backward."""
        np.mean(x, axis=1, out=mean)
        np.subtract(x, mean[:, None], out=out)
        np.divide(1.0, np.sqrt(np.mean(out * out, axis=1) + NORM_EPSILON), out=rstd)
        out *= rstd[:, None]
        out *= weight
        out += bias

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
        """Total (N, C) = residual + branch + branch_bias; out = layer norm of total."""
        np.add(branch, branch_bias, out=total)
        total += residual
        self.norm_forward(out, mean, rstd, total, weight, bias)

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
        """Add the gradient of layer norm to dx (N, C) (write it where ``fresh``), dweight (C,) and dbias (C,).

        dbranch (C,), unless None, += column sums of the new dx: the bias gradient of the branch added to x.
        """
        normed = (x - mean[:, None]) * rstd[:, None]
        dbias += dout.sum(axis=0)
        dweight += (dout * normed).sum(axis=0)
        dnormed = dout * weight
        average = dnormed.mean(axis=1, keepdims=True)
        normed *= (dnormed * normed).mean(axis=1, keepdims=True)
        dnormed -= average
        dnormed -= normed
        dnormed *= rstd[:, None]
        if fresh:
            dx[...] = dnormed
        else:
            dx += dnormed
        if dbranch is not None:
            dbranch += dx.sum(axis=0)

    def column_sums(self, dbias: Array, dy: Array) -> None:
        """Dbias (C,) += column sums of dy (N, C)."""
        dbias += dy.sum(axis=0)

    def gelu_forward(self, out: Array, h: Array, bias: Array) -> None:
        """Out (N, K) = GELU(h + bias), the tanh form (Hendrycks, Gimpel 2016); h (N, K) becomes GELU'(h + bias)."""
        h += bias
        square = h * h
        t = np.tanh(GELU_SCALE * (h + GELU_CUBIC * square * h))
        gate = 0.5 * (1.0 + t)
        np.multiply(h, gate, out=out)
        h[...] = gate + 0.5 * h * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * square)

    def gelu_backward(self, dh: Array, dbias: Array, slope: Array) -> None:
        """Dh (N, K) *= slope, in place of the gradient of the output; dbias (K,) += its column sums."""
        dh *= slope
        dbias += dh.sum(axis=0)

    def product_gelu(self, out: Array, slope: Array, a: Array, b: Array, bias: Array) -> None:
        """Out (M, N) = GELU(a b + bias), slope (M, N) = GELU'(a b + bias); a (M, K), b (K, N), all C-contiguous."""
        self.product(slope, a, b)
        self.gelu_forward(out, slope, bias)

    def product_slope(self, out: Array, dbias: Array, a: Array, b: Array, slope: Array) -> None:
        """Out (M, N) = a b^T times slope, dbias (N,) += its column sums; a (M, K), b (N, K), all C-contiguous."""
        self.product(out, a, b.T)
        self.gelu_backward(out, dbias, slope)

    def dropout(self, x: Array, keys: NDArray[np.uint64], threshold: int) -> None:
        """Drop elements of x (N, C) in place; the rows of sequence b are x.reshape(B, T, C)[b], under keys[b]."""
        rows = x.reshape(len(keys), -1)
        rows *= kept_factor(keys, rows.shape[1:], threshold, x.dtype)

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
        """Causal attention (Vaswani et al. 2017).

        Args:
            out: (N, C).
            p: (B, H, Tp, Tp) keeps the probabilities, before dropout; Tp is T rounded up to 16.
            qkv: (N, 3C) the product without its bias.
            bias: (3C,).
            shape: B, T, H, D.
            keys: (B,) of the sequences, where ``threshold`` is above 0.
            threshold: see :mod:`hiermpi.kernels.layers`.
        """
        batch, length, heads, width = shape
        q, k, v = self._heads(qkv + bias, shape)
        scores = np.matmul(q, k.swapaxes(2, 3)) * (1.0 / sqrt(width))
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        scores -= scores.max(axis=3, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=3, keepdims=True)
        p[:, :, :length, :length] = scores
        if threshold:
            scores *= kept_factor(keys, scores.shape[1:], threshold, out.dtype)
        out.reshape(batch, length, heads, width)[...] = np.matmul(scores, v).swapaxes(1, 2)

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
        """Dqkv (N, 3C) is written, dbias (3C,) added to; other arguments as in the forward pass."""
        batch, length, heads, width = shape
        channels = heads * width
        q, k, v = self._heads(qkv + bias, shape)
        grown = dout.reshape(batch, length, heads, width).swapaxes(1, 2)
        scores = p[:, :, :length, :length]
        dscores = np.matmul(grown, v.swapaxes(2, 3))
        used = scores
        if threshold:
            factor = kept_factor(keys, scores.shape[1:], threshold, dout.dtype)
            used = scores * factor
            dscores *= factor
        dscores -= (dscores * scores).sum(axis=3, keepdims=True)
        dscores *= scores
        dscores *= 1.0 / sqrt(width)
        parts = dqkv.reshape(batch, length, 3, heads, width)
        parts[:, :, 0] = np.matmul(dscores, k).swapaxes(1, 2)
        parts[:, :, 1] = np.matmul(dscores.swapaxes(2, 3), q).swapaxes(1, 2)
        parts[:, :, 2] = np.matmul(used.swapaxes(2, 3), grown).swapaxes(1, 2)
        # A key bias adds one constant to each row of scores, which softmax does not see: its gradient is zero.
        # What rounding leaves of it would be blown up by AdamW, so it is not added.
        dbias[:channels] += dqkv[:, :channels].sum(axis=0)
        dbias[2 * channels :] += dqkv[:, 2 * channels :].sum(axis=0)

    def cross_entropy(self, logits: Array, targets: NDArray[np.int32], gradient: bool) -> float:
        """The sum of the losses of logits (N, V) over targets (N,), in nats; targets below 0 count for nothing.

        With ``gradient``, logits become softmax - onehot, the gradient of the sum (zero rows where ignored).
        """
        top = logits.max(axis=1, keepdims=True)
        shifted = np.subtract(logits, top, out=logits)
        rows = np.flatnonzero(targets >= 0)
        hit = shifted[rows, targets[rows]].astype(np.float64)
        np.exp(shifted, out=shifted)
        total = shifted.sum(axis=1)
        loss = float((np.log(total[rows], dtype=np.float64) - hit).sum())
        if gradient:
            logits /= total[:, None]
            logits[rows, targets[rows]] -= 1.0
            logits[targets < 0] = 0.0
        return loss

    def sum_buffers(self, out: Array, buffers: Array, start: int, stop: int) -> None:
        """out[start:stop] = the sum over axis 0 of buffers (P, n), in the order of the buffers."""
        for first in range(start, stop, SUM_PIECE):
            piece = slice(first, min(first + SUM_PIECE, stop))
            out[piece] = buffers[0, piece]
            for addend in buffers[1:, piece]:
                out[piece] += addend

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
        """Apply AdamW (Loshchilov, Hutter 2019) to one run of elements, in float32.

        Args:
            arrays: out, out_m, out_v, which are written, and parameters, gradients, m, v, all of one length; what is
                written may be what is read.
            scale: factor on the gradients.
            beta1: decay of the first moment.
            beta2: decay of the second moment.
            step_size: the learning rate over 1 - beta1^t.
            root_correction: 1 / sqrt(1 - beta2^t).
            eps: as in the paper.
            shrink: factor of the weight decay on the parameters.
        """
        for first in range(0, len(arrays[0]), ADAMW_BLOCK):
            out, out_m, out_v, parameters, gradients, m, v = (array[first : first + ADAMW_BLOCK] for array in arrays)
            single = np.float32
            x = gradients * single(scale)
            np.add(m * single(beta1), x * (single(1) - single(beta1)), out=out_m)
            np.add(v * single(beta2), (x * x) * (single(1) - single(beta2)), out=out_v)
            change = out_m / (np.sqrt(out_v) * single(root_correction) + single(eps))
            np.subtract(parameters * single(shrink), change * single(step_size), out=out)

    def block_sums(self, sums: NDArray[np.float64], vector: Array, bounds: NDArray[np.int64]) -> None:
        """Sums (n,) = sum of squares of vector[start:stop], in float64, for each row of bounds (n, 2)."""
        for index, (start, stop) in enumerate(bounds):
            part = vector[start:stop].astype(np.float64)
            sums[index] = np.dot(part, part)

    def add_fixed(self, sums: NDArray[np.int64], x: Array, unit: float, limit: float, fresh: bool) -> bool:
        """Add x (n,) in multiples of ``unit``, a power of two, to sums (n,), or write it there where ``fresh``.

        Returns whether every element was finite and below ``limit``; otherwise the sums are not to be used.
        """
        good = bool((np.abs(x) < np.float32(limit)).all())
        if good:
            rounded = np.rint(x * np.float32(1 / unit)).astype(np.int64)
            sums[:] = rounded if fresh else sums + rounded
        return good

    def from_fixed(self, out: Array, sums: NDArray[np.int64], unit: float) -> None:
        """Write sums (n,) of multiples of ``unit``, rounded to float32, to out (n,)."""
        out[:] = sums.astype(np.float64) * unit

    def multiply_adds(self, flops: float) -> None:
        """Do about so many floating-point operations on registers alone, where a compiled form is there to do them."""

    def _heads(self, qkv: Array, shape: Sequence[int]) -> tuple[Array, Array, Array]:
        """q, k, v as (B, H, T, D) views of qkv (N, 3C)."""
        batch, length, heads, width = shape
        parts = qkv.reshape(batch, length, 3, heads, width).transpose(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]


_MASK = (1 << 64) - 1


def threshold_of(rate: float) -> int:
    """An element is kept iff its 32 bits are at least this."""
    return min(round(rate * 2**32), 2**32 - 1)


def splitmix64(state: int) -> int:
    """One step of splitmix64: 64 well-mixed bits of a 64-bit state."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sequence_keys(seed: int, step: int, sequence_ids: NDArray[np.int64], site: int) -> NDArray[np.uint64]:
    """(B,) keys of the sequences at a site.

    Args:
        seed: of the run.
        step: the step the bits are for.
        sequence_ids: (B,) identities of the sequences.
        site: which dropout of the model.
    """
    common = splitmix64(splitmix64(splitmix64(seed & _MASK) ^ step) ^ site)
    return np.array([splitmix64(common ^ int(identity)) for identity in sequence_ids], np.uint64)


def element_bits(keys: NDArray[np.uint64], elements: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The 32 bits of ``elements`` under ``keys`` (arrays that broadcast)."""
    low, high = (keys & 0xFFFFFFFF).astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    return _mix(_mix(elements ^ low) ^ high)


def kept_factor(
    keys: NDArray[np.uint64], shape: tuple[int, ...], threshold: int, dtype: np.dtype
) -> NDArray[np.floating]:
    """(B, *shape): 0 where an element is dropped, 1 / (1 - rate) where it is kept.

    Args:
        keys: (B,) from :func:`sequence_keys`.
        shape: of what one sequence has at the site; elements are numbered in C order.
        threshold: from :func:`threshold_of`.
        dtype: of the result.
    """
    elements = np.arange(int(np.prod(shape)), dtype=np.uint64).astype(np.uint32).reshape(shape)
    bits = element_bits(keys.reshape(-1, *(1,) * len(shape)), elements)
    return np.where(bits >= np.uint32(threshold), kept_scale(threshold), 0.0).astype(dtype)


def kept_scale(threshold: int) -> float:
    """What a kept element is multiplied by: 1 / (1 - rate), as float32."""
    return float(np.float32(1.0 / (1.0 - threshold / 2**32)))


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
