"""This module has the layers in plain numpy: the specification with which every faster form must agree.

The kernels work on arrays of any floating dtype, keep no state, and write their outputs into arrays of the caller.
The names of gradients begin with ``d``. Shapes use B sequences of T tokens, N = B * T rows, C channels, H heads of size
D = C / H, and V rows of the token table.

Dropout is a pure function of the seed, the step, the identity of a sequence, the site in the model and the number of an
element there, so that any rank computes the same. A key of 64 bits for each sequence comes from splitmix64 (Steele, Lea
and Flood 2014); each element gets 32 bits from its number and the key by two rounds of a 32-bit mix (Wellons'
lowbias32). An element is dropped where its bits are below a threshold, ``rate`` in units of 2^-32.
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
"""The elements that are summed over all buffers at a time: few enough to stay in the cache."""

ADAMW_BLOCK = 1 << 15
"""The elements that AdamW updates at a time: few enough that its temporaries stay in the cache."""

NO_KEYS = np.zeros(0, np.uint64)


def padded(n: int) -> int:
    """Return ``n`` rounded up to a multiple of 16, as attention probabilities are laid out."""
    return -(-n // 16) * 16


class ReferenceKernels:
    """The kernels in numpy, which are the specification of all others."""

    name = "numpy"
    floats = 0
    """The number of floats in a register; numpy does not tell it."""

    def __init__(self) -> None:
        self._products = np.empty(0)
        self.scratch: Array = np.empty(0)
        """The memory into which compiled kernels pack operands; they allocate more where it is too small."""
        self.own_products = False

    def product(self, out: Array, a: Array, b: Array, add: bool = False) -> None:
        """Compute out = a b, or out += a b where ``add``.

        Args:
            out: (M, N) The product.
            a: (M, K) The left factor, C-contiguous or the transpose of such an array.
            b: (K, N) The right factor, C-contiguous or the transpose of such an array.
            add: Whether the product is added to ``out`` instead of written.
        """
        if not add:
            np.matmul(a, b, out=out)
            return
        if self._products.size < out.size or self._products.dtype != out.dtype:
            self._products = np.empty(out.size, out.dtype)
        product = self._products[: out.size].reshape(out.shape)
        np.matmul(a, b, out=product)
        out += product

    def embed_forward(self, x: Array, inputs: NDArray[np.int32], wte: Array, wpe: Array) -> None:
        """Compute x = wte[inputs] + wpe[position].

        Args:
            x: (N, C) The embeddings to write.
            inputs: (B, T) The rows of the token table.
            wte: (V, C) The token table.
            wpe: (>= T, C) The table of positions.
        """
        batch, length = inputs.shape
        np.take(wte, inputs.reshape(-1), axis=0, out=x)
        x.reshape(batch, length, -1)[...] += wpe[:length]

    def embed_backward(self, dwte: Array, dwpe: Array, dx: Array, inputs: NDArray[np.int32]) -> None:
        """Compute dwte[inputs] += dx, in the order of the rows, and dwpe[position] += dx.

        Args:
            dwte: (V, C) The gradient of the token table.
            dwpe: (>= T, C) The gradient of the table of positions.
            dx: (N, C) The gradient of the embeddings.
            inputs: (B, T) The rows of the token table.
        """
        batch, length = inputs.shape
        np.add.at(dwte, inputs.reshape(-1), dx)
        dwpe[:length] += dx.reshape(batch, length, -1).sum(axis=0)

    def norm_forward(self, out: Array, mean: Array, rstd: Array, x: Array, weight: Array, bias: Array) -> None:
        """Compute out = layer norm of the rows of x (Ba, Kiros, Hinton 2016).

        Args:
            out: (N, C) The result.
            mean: (N,) The means of the rows, written for the backward pass.
            rstd: (N,) The inverse standard deviations of the rows, written for the backward pass.
            x: (N, C) The input.
            weight: (C,) The factors of the channels.
            bias: (C,) The addends of the channels.
        """
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
        """Compute total = residual + branch + branch_bias, and out = layer norm of total.

        Args:
            total: (N, C) The sum, written.
            out: (N, C) The norm of the sum, written.
            mean: (N,) The means of the rows, written for the backward pass.
            rstd: (N,) The inverse standard deviations of the rows, written for the backward pass.
            residual: (N, C) The residual stream.
            branch: (N, C) The output of the branch without its bias.
            branch_bias: (C,) The bias of the branch.
            weight: (C,) The factors of the norm.
            bias: (C,) The addends of the norm.
        """
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
        """Add the gradients of layer norm to dx, dweight and dbias.

        Args:
            dx: (N, C) The gradient of the input.
            dweight: (C,) The gradient of ``weight``.
            dbias: (C,) The gradient of the norm's bias.
            dbranch: (C,) The bias gradient of the branch that was added to x: unless None, the column sums of the new
                dx are added to it.
            dout: (N, C) The gradient of the output.
            x: (N, C) The input of the forward pass.
            mean: (N,) The means of the rows, from the forward pass.
            rstd: (N,) The inverse standard deviations of the rows, from the forward pass.
            weight: (C,) The factors of the channels.
            fresh: Whether dx is written instead of added to.
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
        """Add the column sums of ``dy`` (N, C) to ``dbias`` (C,)."""
        dbias += dy.sum(axis=0)

    def gelu_forward(self, out: Array, h: Array, bias: Array) -> None:
        """Compute out = GELU(h + bias) in the tanh form (Hendrycks, Gimpel 2016), and its slope.

        Args:
            out: (N, K) The result.
            h: (N, K) The input without its bias; it becomes the slope GELU'(h + bias).
            bias: (K,) The bias.
        """
        h += bias
        square = h * h
        t = np.tanh(GELU_SCALE * (h + GELU_CUBIC * square * h))
        gate = 0.5 * (1.0 + t)
        np.multiply(h, gate, out=out)
        h[...] = gate + 0.5 * h * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * square)

    def gelu_backward(self, dh: Array, dbias: Array, slope: Array) -> None:
        """Compute the gradient of GELU's input in place, and add its column sums to dbias.

        Args:
            dh: (N, K) The gradient of the output; it is multiplied by ``slope``.
            dbias: (K,) The gradient of the bias.
            slope: (N, K) The slope from the forward pass.
        """
        dh *= slope
        dbias += dh.sum(axis=0)

    def product_gelu(self, out: Array, slope: Array, a: Array, b: Array, bias: Array) -> None:
        """Compute out = GELU(a b + bias) and slope = GELU'(a b + bias); all arrays must be C-contiguous.

        Args:
            out: (M, N) The result.
            slope: (M, N) The slope at the result.
            a: (M, K) The left factor.
            b: (K, N) The right factor.
            bias: (N,) The bias.
        """
        self.product(slope, a, b)
        self.gelu_forward(out, slope, bias)

    def product_slope(self, out: Array, dbias: Array, a: Array, b: Array, slope: Array) -> None:
        """Compute out = (a b^T) * slope, and add its column sums to dbias; all arrays must be C-contiguous.

        Args:
            out: (M, N) The result.
            dbias: (N,) The gradient of the bias.
            a: (M, K) The left factor.
            b: (N, K) The right factor, not transposed.
            slope: (M, N) The slope of GELU.
        """
        self.product(out, a, b.T)
        self.gelu_backward(out, dbias, slope)

    def dropout(self, x: Array, keys: NDArray[np.uint64], threshold: int) -> None:
        """Drop elements of x in place, and scale the others.

        Args:
            x: (N, C) The elements; those of sequence b are x.reshape(B, T, C)[b].
            keys: (B,) The keys of the sequences, from :func:`sequence_keys`.
            threshold: The threshold from :func:`threshold_of`.
        """
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
        """Compute causal attention (Vaswani et al. 2017).

        Args:
            out: (N, C) The result.
            p: (B, H, Tp, Tp) The probabilities before dropout, written for the backward pass; Tp is T rounded up to 16.
            qkv: (N, 3C) The queries, keys and values without their bias.
            bias: (3C,) The bias of ``qkv``.
            shape: The sizes B, T, H, D.
            keys: (B,) The dropout keys of the sequences, where ``threshold`` is above 0.
            threshold: The threshold from :func:`threshold_of`; with 0 nothing is dropped.
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
        """Compute the gradients of causal attention.

        Args:
            dqkv: (N, 3C) The gradient of ``qkv``, written.
            dbias: (3C,) The gradient of the bias, to which is added.
            dout: (N, C) The gradient of the output.
            p: (B, H, Tp, Tp) The probabilities from the forward pass.
            qkv: (N, 3C) The queries, keys and values without their bias.
            bias: (3C,) The bias of ``qkv``.
            shape: The sizes B, T, H, D.
            keys: (B,) The dropout keys of the sequences, where ``threshold`` is above 0.
            threshold: The threshold of the forward pass.
        """
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
        # A key bias adds one constant to each row of scores, which does not change the softmax: its gradient is zero.
        # AdamW would enlarge the rounding errors of that zero, so they are not added.
        dbias[:channels] += dqkv[:, :channels].sum(axis=0)
        dbias[2 * channels :] += dqkv[:, 2 * channels :].sum(axis=0)

    def cross_entropy(self, logits: Array, targets: NDArray[np.int32], gradient: bool) -> float:
        """Return the sum of the cross-entropy losses, in nats.

        Args:
            logits: (N, V) The logits, overwritten; with ``gradient`` they become softmax - onehot, the gradient of the
                sum, with zeros in the rows of ignored targets.
            targets: (N,) The rows of the targets; targets below 0 are ignored.
            gradient: Whether the gradient is wanted.
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
        """Compute out[start:stop] = the sum over axis 0 of the buffers, added in their order.

        Args:
            out: (n,) The sum.
            buffers: (P, n) The buffers.
            start: The first element to sum.
            stop: The element at which summing ends.
        """
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
            arrays: The arrays out, out_m and out_v, which are written, and parameters, gradients, m and v, all of one
                length; written arrays may be those that are read.
            scale: The factor of the gradients.
            beta1: The decay of the first moment.
            beta2: The decay of the second moment.
            step_size: The learning rate over 1 - beta1^t.
            root_correction: The value of 1 / sqrt(1 - beta2^t).
            eps: The addend in the denominator, as in the paper.
            shrink: The factor of the parameters that weight decay makes.
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
        """Compute the sum of squares of vector[start:stop] for each block, in float64.

        Args:
            sums: (n,) The sums, written.
            vector: (size,) The vector.
            bounds: (n, 2) The start and stop of each block.
        """
        for index, (start, stop) in enumerate(bounds):
            part = vector[start:stop].astype(np.float64)
            sums[index] = np.dot(part, part)

    def add_fixed(self, sums: NDArray[np.int64], x: Array, unit: float, limit: float, fresh: bool) -> bool:
        """Add x, rounded to multiples of ``unit``, to sums in fixed point.

        Args:
            sums: (n,) The sums in multiples of ``unit``.
            x: (n,) The addends.
            unit: The unit, a power of two.
            limit: The bound below which the absolute values of addends must be.
            fresh: Whether the sums are written instead of added to.

        Returns:
            Whether every addend was finite and below ``limit``; otherwise the sums must not be used.
        """
        good = bool((np.abs(x) < np.float32(limit)).all())
        if good:
            rounded = np.rint(x * np.float32(1 / unit)).astype(np.int64)
            sums[:] = rounded if fresh else sums + rounded
        return good

    def from_fixed(self, out: Array, sums: NDArray[np.int64], unit: float) -> None:
        """Convert sums in fixed point to float32.

        Args:
            out: (n,) The floats, written.
            sums: (n,) The sums in multiples of ``unit``.
            unit: The unit.
        """
        out[:] = sums.astype(np.float64) * unit

    def multiply_adds(self, flops: float) -> None:
        """Do nothing: numpy cannot do floating-point operations on registers alone, as compiled forms do."""

    def _heads(self, qkv: Array, shape: Sequence[int]) -> tuple[Array, Array, Array]:
        """Return q, k and v as (B, H, T, D) views of qkv (N, 3C)."""
        batch, length, heads, width = shape
        parts = qkv.reshape(batch, length, 3, heads, width).transpose(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]


_MASK = (1 << 64) - 1


def threshold_of(rate: float) -> int:
    """Return the threshold of a dropout rate: an element is kept where its 32 bits are at least the threshold."""
    return min(round(rate * 2**32), 2**32 - 1)


def splitmix64(state: int) -> int:
    """Return 64 well-mixed bits of a 64-bit state by one step of splitmix64.

    The generator is that of Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014); the
    multipliers are those of variant 13 of Stafford's mixes, which splitmix64 uses.
    """
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sequence_keys(seed: int, step: int, sequence_ids: NDArray[np.int64], site: int) -> NDArray[np.uint64]:
    """Return the (B,) keys of the sequences at a dropout site.

    Args:
        seed: The seed of the run.
        step: The number of steps finished before this one.
        sequence_ids: (B,) The identities of the sequences.
        site: The number of the dropout site in the model.
    """
    common = splitmix64(splitmix64(splitmix64(seed & _MASK) ^ step) ^ site)
    return np.array([splitmix64(common ^ int(identity)) for identity in sequence_ids], np.uint64)


def element_bits(keys: NDArray[np.uint64], elements: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the 32 bits of ``elements`` under ``keys``; the arrays broadcast."""
    low, high = (keys & 0xFFFFFFFF).astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    return _mix(_mix(elements ^ low) ^ high)


def kept_factor(
    keys: NDArray[np.uint64], shape: tuple[int, ...], threshold: int, dtype: np.dtype
) -> NDArray[np.floating]:
    """Return the (B, *shape) factors of elements: 0 where they are dropped, 1 / (1 - rate) where they are kept.

    Args:
        keys: (B,) The keys of the sequences, from :func:`sequence_keys`.
        shape: The shape of one sequence's elements at the site; they are numbered in C order.
        threshold: The threshold from :func:`threshold_of`.
        dtype: The element type of the result.
    """
    elements = np.arange(int(np.prod(shape)), dtype=np.uint64).astype(np.uint32).reshape(shape)
    bits = element_bits(keys.reshape(-1, *(1,) * len(shape)), elements)
    return np.where(bits >= np.uint32(threshold), kept_scale(threshold), 0.0).astype(dtype)


def kept_scale(threshold: int) -> float:
    """Return the factor of a kept element: 1 / (1 - rate), as float32."""
    return float(np.float32(1.0 / (1.0 - threshold / 2**32)))


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return well-mixed 32 bits of each element: Wellons' lowbias32, found in his hash-prospector (2018)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
