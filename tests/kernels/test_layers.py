"""Each layer of the numpy reference: forward against loops, backward against central differences."""

from math import exp, log, pi, sqrt, tanh

import numpy as np
import pytest

from hiermpi.kernels.layers import NORM_EPSILON, ReferenceKernels, kept_factor, padded, sequence_keys, threshold_of
from hiermpi.model.contract import IGNORED_TARGET

LAYERS = ReferenceKernels()
ROW_SHAPES = [(1, 1), (1, 7), (5, 3), (11, 16)]
ATTENTION_SHAPES = [(1, 1, 1, 1), (1, 5, 3, 7), (3, 17, 1, 2), (2, 6, 2, 5)]  # B, T, H, D


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def differences(scalar, x, step=1e-6):
    """Central differences of ``scalar()`` in every element of ``x``, which is moved and put back."""
    slope = np.empty_like(x)
    for index in np.ndindex(x.shape):
        before = x[index]
        x[index] = before + step
        above = scalar()
        x[index] = before - step
        below = scalar()
        x[index] = before
        slope[index] = (above - below) / (2 * step)
    return slope


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


# Embedding.


def test_embedding_adds_token_and_position():
    wte, wpe = normal(0, 6, 3), normal(1, 9, 3)
    inputs = np.array([[5, 0, 5, 2], [1, 1, 1, 1]], np.int32)
    x = np.empty((8, 3))
    LAYERS.embed_forward(x, inputs, wte, wpe)
    for b, t in np.ndindex(inputs.shape):
        np.testing.assert_array_equal(x[4 * b + t], wte[inputs[b, t]] + wpe[t])


def test_embedding_gradients_add_up_over_repeated_tokens():
    inputs = np.array([[5, 0, 5, 2], [1, 1, 1, 1]], np.int32)
    dx = normal(0, 8, 3)
    dwte, dwpe = np.full((6, 3), 2.0), np.full((9, 3), -1.0)  # gradients are added to what is there
    LAYERS.embed_backward(dwte, dwpe, dx, inputs)
    expected_wte, expected_wpe = np.full((6, 3), 2.0), np.full((9, 3), -1.0)
    for b, t in np.ndindex(inputs.shape):
        expected_wte[inputs[b, t]] += dx[4 * b + t]
        expected_wpe[t] += dx[4 * b + t]
    close(dwte, expected_wte)
    close(dwpe, expected_wpe)


def test_embedding_gradients_are_bitwise_deterministic():
    inputs = np.random.default_rng(0).integers(0, 3, (4, 50)).astype(np.int32)
    dx = normal(1, 200, 5).astype(np.float32)
    results = []
    for _ in range(2):
        dwte, dwpe = np.zeros((3, 5), np.float32), np.zeros((50, 5), np.float32)
        LAYERS.embed_backward(dwte, dwpe, dx, inputs)
        results.append((dwte, dwpe))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


# Layer norm.


def norm_forward(x, weight, bias):
    out, mean, rstd = np.empty_like(x), np.empty(len(x)), np.empty(len(x))
    LAYERS.norm_forward(out, mean, rstd, x, weight, bias)
    return out, mean, rstd


@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_norm_forward(shape):
    x, weight, bias = normal(0, *shape), normal(1, shape[1]), normal(2, shape[1])
    out, mean, rstd = norm_forward(x, weight, bias)
    for n, row in enumerate(x):
        mu = sum(row) / len(row)
        variance = sum((value - mu) ** 2 for value in row) / len(row)
        close(mean[n], mu)
        close(rstd[n], 1 / sqrt(variance + NORM_EPSILON))
        close(out[n], (row - mu) / sqrt(variance + NORM_EPSILON) * weight + bias)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_norm_backward(shape, fresh):
    x, weight, bias, dout = normal(0, *shape), normal(1, shape[1]), normal(2, shape[1]), normal(3, *shape)
    _, mean, rstd = norm_forward(x, weight, bias)
    dx, (dweight, dbias, dbranch) = normal(4, *shape), normal(5, 3, shape[1])
    before = dx.copy(), dweight.copy(), dbias.copy(), dbranch.copy()
    LAYERS.norm_backward(dx, dweight, dbias, dbranch, dout, x, mean, rstd, weight, fresh)

    def scalar():
        return (norm_forward(x, weight, bias)[0] * dout).sum()

    close(dx, differences(scalar, x) + (0 if fresh else before[0]))
    close(dweight - before[1], differences(scalar, weight))
    close(dbias - before[2], differences(scalar, bias))
    close(dbranch - before[3], dx.sum(axis=0))


def test_norm_backward_without_a_branch_below():
    x, weight, bias, dout = normal(0, 4, 3), normal(1, 3), normal(2, 3), normal(3, 4, 3)
    _, mean, rstd = norm_forward(x, weight, bias)
    with_branch, without = np.zeros((4, 3)), np.zeros((4, 3))
    for dx, dbranch in ((with_branch, np.zeros(3)), (without, None)):
        LAYERS.norm_backward(dx, np.zeros(3), np.zeros(3), dbranch, dout, x, mean, rstd, weight, True)
    np.testing.assert_array_equal(without, with_branch)


def test_residual_norm_is_the_norm_of_the_sum():
    residual, branch, branch_bias = normal(0, 5, 3), normal(1, 5, 3), normal(2, 3)
    weight, bias = normal(3, 3), normal(4, 3)
    total, out, mean, rstd = np.empty((5, 3)), np.empty((5, 3)), np.empty(5), np.empty(5)
    LAYERS.residual_norm_forward(total, out, mean, rstd, residual, branch, branch_bias, weight, bias)
    expected = residual + branch + branch_bias
    close(total, expected)
    for actual, wanted in zip((out, mean, rstd), norm_forward(expected, weight, bias), strict=True):
        close(actual, wanted)


def test_column_sums():
    dy, dbias = normal(0, 5, 3), np.full(3, 2.0)
    LAYERS.column_sums(dbias, dy)
    close(dbias, [2.0 + sum(dy[:, c]) for c in range(3)])


# GELU.


def gelu(h, bias):
    slope, out = h.copy(), np.empty_like(h)
    LAYERS.gelu_forward(out, slope, bias)
    return out, slope


@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_gelu_forward(shape):
    h, bias = 3 * normal(0, *shape), normal(1, shape[1])
    out, _ = gelu(h, bias)
    for n, c in np.ndindex(shape):
        x = h[n, c] + bias[c]
        close(out[n, c], 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_gelu_backward(shape):
    h, bias, dout = 3 * normal(0, *shape), normal(1, shape[1]), normal(2, *shape)
    _, slope = gelu(h, bias)
    dh, dbias = dout.copy(), np.full(shape[1], 2.0)
    LAYERS.gelu_backward(dh, dbias, slope)

    def scalar():
        return (gelu(h, bias)[0] * dout).sum()

    close(dh, differences(scalar, h))
    close(dbias - 2.0, differences(scalar, bias))


def test_gelu_far_out_is_the_identity_or_zero():
    h = np.array([[40.0, -40.0]])
    out, slope = gelu(h, np.zeros(2))
    np.testing.assert_array_equal(out, [[40.0, 0.0]])
    dh = np.ones((1, 2))
    LAYERS.gelu_backward(dh, np.zeros(2), slope)
    np.testing.assert_array_equal(dh, [[1.0, 0.0]])


@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_products_with_gelu_are_the_two_one_after_the_other(shape):
    rows, columns = shape
    a, b, bias = normal(0, rows, 5), normal(1, 5, columns), normal(2, columns)
    out, slope = np.empty(shape), np.empty(shape)
    LAYERS.product_gelu(out, slope, a, b, bias)
    expected = gelu(a @ b, bias)
    close(out, expected[0])
    close(slope, expected[1])
    dh, dbias = np.empty((rows, 5)), np.full(5, 2.0)
    grown, kept = normal(3, rows, columns), normal(4, rows, 5)
    LAYERS.product_slope(dh, dbias, grown, b, kept)
    close(dh, grown @ b.T * kept)
    close(dbias, 2.0 + dh.sum(axis=0))


# Dropout.


def test_dropout_multiplies_by_the_kept_factor():
    x, keys, threshold = normal(0, 6, 5), sequence_keys(1, 2, np.array([7, 8]), 3), threshold_of(0.4)
    before = x.copy()
    LAYERS.dropout(x, keys, threshold)
    factor = kept_factor(keys, (3, 5), threshold, x.dtype).reshape(6, 5)
    assert 0 < (factor == 0).sum() < factor.size
    np.testing.assert_array_equal(x, before * factor)


# Attention.


class Attention:
    """Inputs of one attention, with and without dropout."""

    def __init__(self, shape, rate=0.0, dtype=np.float64):
        self.shape = shape
        batch, length, heads, width = shape
        self.qkv = normal(0, batch * length, 3 * heads * width).astype(dtype)
        self.bias = normal(1, 3 * heads * width).astype(dtype)
        self.threshold = threshold_of(rate)
        self.keys = sequence_keys(1, 2, np.arange(batch), 3)
        self.p = np.zeros((batch, heads, padded(length), padded(length)), dtype)

    def forward(self):
        batch, length, heads, width = self.shape
        out = np.empty((batch * length, heads * width), self.qkv.dtype)
        LAYERS.attention_forward(out, self.p, self.qkv, self.bias, self.shape, self.keys, self.threshold)
        return out

    def naive(self):
        """The same by loops over sequences, heads and positions; also the probabilities."""
        batch, length, heads, width = self.shape
        q, k, v = np.moveaxis((self.qkv + self.bias).reshape(batch, length, 3, heads, width), 2, 0)
        factor = np.ones((batch, heads, length, length))
        if self.threshold:
            factor = kept_factor(self.keys, (heads, length, length), self.threshold, np.dtype(float))
        out, p = np.zeros((batch, length, heads, width)), np.zeros((batch, heads, length, length))
        for b, h, t in np.ndindex(batch, heads, length):
            weights = [exp(float(q[b, t, h] @ k[b, s, h]) / sqrt(width)) for s in range(t + 1)]
            for s in range(t + 1):
                p[b, h, t, s] = weights[s] / sum(weights)
                out[b, t, h] += p[b, h, t, s] * factor[b, h, t, s] * v[b, s, h]
        return out.reshape(batch * length, -1), p


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_forward(shape, rate):
    attention = Attention(shape, rate)
    out, p = attention.naive()
    close(attention.forward(), out)
    length = shape[1]
    close(attention.p[:, :, :length, :length], p)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention_backward(shape, rate):
    attention = Attention(shape, rate)
    dout = normal(2, *attention.forward().shape)
    channels = dout.shape[1]
    dqkv, dbias = normal(3, *attention.qkv.shape), np.full(3 * channels, 2.0)
    kept = attention.p.copy()
    arrays = (kept, attention.qkv, attention.bias, shape, attention.keys, attention.threshold)
    LAYERS.attention_backward(dqkv, dbias, dout, *arrays)

    def scalar():
        return (attention.forward() * dout).sum()

    close(dqkv, differences(scalar, attention.qkv))
    close(dbias - 2.0, differences(scalar, attention.bias))


def test_the_key_bias_has_no_gradient_at_all():
    """Softmax does not see it: what rounding leaves would be noise, which AdamW would amplify."""
    attention = Attention((2, 9, 2, 4), dtype=np.float32)
    dout = normal(2, *attention.forward().shape).astype(np.float32)
    dqkv, dbias = np.empty_like(attention.qkv), np.zeros(24, np.float32)
    LAYERS.attention_backward(dqkv, dbias, dout, attention.p, attention.qkv, attention.bias, attention.shape)
    assert dqkv[:, 8:16].sum(axis=0).any()  # the noise is there
    np.testing.assert_array_equal(dbias[8:16], 0.0)


def test_attention_does_not_look_ahead():
    attention = Attention((1, 6, 2, 3))
    before = attention.forward()
    attention.qkv[4:] += 1.0
    after = attention.forward()
    np.testing.assert_array_equal(after[:4], before[:4])
    assert (after[4:] != before[4:]).all()


def test_attention_of_large_scores_is_finite():
    attention = Attention((1, 6, 2, 3), dtype=np.float32)
    attention.qkv *= 1e3
    assert np.isfinite(attention.forward()).all()


# Cross-entropy.


def cross_entropy(logits, targets):
    """The loss, and the gradient of the logits."""
    work = logits.copy()
    loss = LAYERS.cross_entropy(work, targets, True)
    return loss, work


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3)])
def test_cross_entropy(shape):
    logits = normal(0, *shape)
    targets = np.random.default_rng(1).integers(0, shape[1], shape[0]).astype(np.int32)
    if shape[0] > 1:
        targets[::3] = IGNORED_TARGET
    loss, dlogits = cross_entropy(logits, targets)
    rows = [(row, t) for row, t in zip(logits, targets, strict=True) if t != IGNORED_TARGET]
    close(loss, sum(log(sum(exp(value) for value in row)) - row[t] for row, t in rows))
    close(dlogits, differences(lambda: cross_entropy(logits, targets)[0], logits))
    np.testing.assert_array_equal(dlogits[targets == IGNORED_TARGET], 0.0)
    assert LAYERS.cross_entropy(logits.copy(), targets, False) == loss


def test_cross_entropy_of_nothing_is_zero():
    loss, dlogits = cross_entropy(normal(0, 3, 4), np.full(3, IGNORED_TARGET, np.int32))
    assert loss == 0.0
    np.testing.assert_array_equal(dlogits, 0.0)


def test_cross_entropy_of_large_logits_is_finite():
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    for target, expected in ((0, 0.0), (1, 1e4), (2, 2e4)):
        loss, dlogits = cross_entropy(logits, np.array([target], np.int32))
        assert loss == expected
        assert np.isfinite(dlogits).all()


def test_cross_entropy_adds_up_in_double_precision():
    """2^25 + 1 does not exist in float32."""
    logits = np.array([[0.0, 2.0**25], [0.0, 1.0]], np.float32)
    loss, _ = cross_entropy(logits, np.array([0, 0], np.int32))
    close(loss - 2.0**25, log(1 + exp(1)))


# Types.


def test_float32_agrees_with_float64_and_is_deterministic():
    shape = (2, 9, 2, 4)
    double, single = Attention(shape, 0.2), Attention(shape, 0.2, np.float32)
    expected, actual = double.forward(), single.forward()
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(single.forward(), actual)
