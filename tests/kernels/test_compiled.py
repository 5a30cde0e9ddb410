"""Every compiled kernel at every level of this processor, against numpy in float64, at odd sizes."""

import numpy as np
import pytest

from hiermpi.errors import UsageError
from hiermpi.kernels import available_levels, load_kernels, using_kernels
from hiermpi.kernels.layers import NO_KEYS, ReferenceKernels, padded, sequence_keys, threshold_of
from hiermpi.optimizer.rules import AdamW, Hyper, Values

AVAILABLE = available_levels()
JUDGE = ReferenceKernels()
ROWS = [(1, 1), (3, 7), (5, 16), (2, 31), (6, 33), (4, 100)]
ATTENTION = [(1, 1, 1, 1), (2, 5, 3, 7), (1, 17, 2, 16), (2, 33, 1, 20), (1, 64, 2, 32)]

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernels are not built here")


@pytest.fixture(params=AVAILABLE)
def kernels(request):
    return load_kernels(request.param)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def agree(kernels, arrays, call, tolerance=2e-5):
    """``call(kernels, *arrays)`` changes float32 copies as the reference changes the float64 originals."""
    single = [a.astype(np.float32) if a.dtype.kind == "f" else a.copy() for a in arrays]
    double = [a.astype(np.float64) if a.dtype.kind == "f" else a.copy() for a in arrays]
    results = [call(kernels, *single), call(JUDGE, *double)]
    for index, (actual, expected) in enumerate(zip(single, double, strict=True)):
        if actual.dtype.kind == "f":
            scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
            np.testing.assert_allclose(actual / scale, expected / scale, atol=tolerance, err_msg=f"array {index}")
    if results[1] is not None:
        assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 5, 2), (8, 48, 7), (9, 49, 17), (17, 95, 33), (7, 15, 64), (33, 130, 5), (2, 1, 40)]
)
def test_product(kernels, sizes, own, add, monkeypatch):
    monkeypatch.setattr(kernels, "own_products", own)
    rows, columns, inner = sizes
    for a_turned, b_turned in ((False, False), (False, True), (True, False), (True, True)):
        a = normal(0, inner, rows) if a_turned else normal(0, rows, inner)
        b = normal(1, columns, inner) if b_turned else normal(1, inner, columns)

        def call(k, out, a, b, a_turned=a_turned, b_turned=b_turned):
            k.product(out, a.T if a_turned else a, b.T if b_turned else b, add)

        agree(kernels, [normal(2, rows, columns), a, b], call)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 5, 2), (8, 48, 7), (9, 49, 17), (17, 95, 33), (7, 15, 64), (33, 130, 5), (2, 1, 300)]
)
def test_products_with_gelu(kernels, sizes, own, monkeypatch):
    monkeypatch.setattr(kernels, "own_products", own)
    rows, columns, inner = sizes
    blank, a, b = np.zeros((rows, columns)), normal(0, rows, inner), normal(1, inner, columns)
    forward = [blank, blank, a, b, normal(2, columns)]
    agree(kernels, forward, lambda k, *arrays: k.product_gelu(*arrays))
    backward = [blank, normal(2, columns), a, np.ascontiguousarray(b.T), normal(3, rows, columns)]
    agree(kernels, backward, lambda k, *arrays: k.product_slope(*arrays))


def test_product_writes_nothing_beside_its_place(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "own_products", True)
    whole = np.full((9, 60), 7.0, np.float32)
    kernels.product(whole[2:7, 5:24], normal(0, 5, 3).astype(np.float32), normal(1, 3, 19).astype(np.float32))
    outside = np.ones(whole.shape, bool)
    outside[2:7, 5:24] = False
    assert (whole[outside] == 7.0).all()
    assert (whole[~outside] != 7.0).all()


def test_an_element_of_a_product_does_not_depend_on_its_place(kernels, monkeypatch):
    """Nor on the rows beside it: a sequence gives the same bits in any unit."""
    monkeypatch.setattr(kernels, "own_products", True)
    a, b = normal(0, 20, 50).astype(np.float32), normal(1, 50, 70).astype(np.float32)
    whole = np.empty((20, 70), np.float32)
    kernels.product(whole, a, b)
    for rows, columns in ((slice(3, 4), slice(0, 70)), (slice(5, 14), slice(9, 40)), (slice(0, 20), slice(69, 70))):
        part = np.empty(whole[rows, columns].shape, np.float32)
        kernels.product(part, np.ascontiguousarray(a[rows]), np.ascontiguousarray(b[:, columns]))
        np.testing.assert_array_equal(part, whole[rows, columns])
    bias, slope = normal(2, 70).astype(np.float32), np.empty_like(whole)
    kernels.product_gelu(whole, slope, a, b, bias)
    for row in (0, 7, 17, 19):
        alone, alone_slope = np.empty((1, 70), np.float32), np.empty((1, 70), np.float32)
        kernels.product_gelu(alone, alone_slope, np.ascontiguousarray(a[row : row + 1]), b, bias)
        np.testing.assert_array_equal(alone[0], whole[row])
        np.testing.assert_array_equal(alone_slope[0], slope[row])


@pytest.mark.parametrize("shape", ROWS)
def test_norm(kernels, shape):
    rows, width = shape
    x, weight, bias = normal(0, *shape), normal(1, width), normal(2, width)
    blank, stats = np.zeros(shape), [np.zeros(rows), np.zeros(rows)]
    if width > 1:
        agree(kernels, [blank, *stats, x, weight, bias], lambda k, *a: k.norm_forward(*a))
        branch, branch_bias = normal(3, *shape), normal(4, width)
        arrays = [blank, blank, *stats, x, branch, branch_bias, weight, bias]
        agree(kernels, arrays, lambda k, *a: k.residual_norm_forward(*a))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("shape", ROWS[1:])
def test_norm_backward(kernels, shape, below, fresh):
    width = shape[1]
    x, weight = normal(0, *shape), normal(1, width)
    mean, rstd = x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + 1e-5)
    arrays = [normal(2, *shape), normal(3, width), normal(4, width), normal(5, width), normal(6, *shape)]

    def call(k, dx, dweight, dbias, dbranch, dout, x, mean, rstd, weight):
        k.norm_backward(dx, dweight, dbias, dbranch if below else None, dout, x, mean, rstd, weight, fresh)

    agree(kernels, [*arrays, x, mean, rstd, weight], call, 1e-4)


@pytest.mark.parametrize("shape", ROWS)
def test_gelu_and_column_sums(kernels, shape):
    h, bias = 3 * normal(0, *shape), normal(1, shape[1])
    agree(kernels, [np.zeros(shape), h, bias], lambda k, *a: k.gelu_forward(*a))
    agree(kernels, [normal(2, *shape), bias, h], lambda k, *a: k.gelu_backward(*a))
    agree(kernels, [bias, h], lambda k, *a: k.column_sums(*a))


@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_embedding(kernels, width):
    inputs = np.array([[5, 0, 5], [1, 1, 4]], np.int32)
    tables = [normal(0, 6, width), normal(1, 4, width)]
    agree(kernels, [np.zeros((6, width)), inputs, *tables], lambda k, *a: k.embed_forward(*a))
    agree(kernels, [*tables, normal(2, 6, width), inputs], lambda k, *a: k.embed_backward(*a))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 200])
def test_dropout_drops_the_same_elements(kernels, size):
    keys, threshold = sequence_keys(3, 5, np.arange(4), 2), threshold_of(0.3)
    x = normal(0, 4, size)
    agree(kernels, [x], lambda k, x: k.dropout(x, keys, threshold))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention(kernels, shape, rate):
    batch, length, heads, width = shape
    rows, channels, threshold = batch * length, heads * width, threshold_of(rate)
    keys = sequence_keys(3, 5, np.arange(batch), 2) if threshold else NO_KEYS
    qkv, bias = normal(0, rows, 3 * channels), normal(1, 3 * channels)
    p = np.zeros((batch, heads, padded(length), padded(length)))

    def both(k, out, p, qkv, bias, dqkv, dbias, dout):
        k.attention_forward(out, p, qkv, bias, shape, keys, threshold)
        k.attention_backward(dqkv, dbias, dout, p, qkv, bias, shape, keys, threshold)
        p[:, :, length:] = p[:, :, :, length:] = 0  # padding is nobody's

    gradients = [np.zeros((rows, 3 * channels)), normal(2, 3 * channels), normal(3, rows, channels)]
    agree(kernels, [np.zeros((rows, channels)), p, qkv, bias, *gradients], both, 1e-4)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape", ROWS)
def test_cross_entropy(kernels, shape, gradient):
    targets = np.random.default_rng(1).integers(-1, shape[1], shape[0]).astype(np.int32)

    def call(k, logits, targets):
        loss = k.cross_entropy(logits, targets, gradient)
        if not gradient:
            logits[...] = 0  # scratch
        return loss

    agree(kernels, [4 * normal(0, *shape), targets], call)


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_adamw_and_sums(kernels, size):
    def update(k, p, g, m, v):
        hyper = Hyper(3, 0.1, 0.5, 0.1, 0.9, 0.99, {}, None)
        for part, decay in ((slice(0, size // 2), 0.1), (slice(size // 2, size), 0.0)):
            values = Values(p[part], {"m": m[part], "v": v[part]})
            AdamW(k).update(values, values, g[part], hyper._replace(weight_decay=decay))

    agree(kernels, [normal(0, size), normal(1, size), normal(2, size), normal(3, size) ** 2], update)
    bounds = np.array([[0, size // 2], [size // 2, size]], np.int64)
    sums, vector = np.zeros(2), normal(4, size).astype(np.float32)
    kernels.block_sums(sums, vector, bounds)
    expected = [float(np.dot(v := vector[a:b].astype(np.float64), v)) for a, b in bounds]
    assert sums == pytest.approx(expected, rel=1e-12)
    buffers = normal(5, 3, size)
    start = size // 3

    def add(k, out, buffers):
        k.sum_buffers(out, buffers, start, size)

    agree(kernels, [normal(6, size), buffers], add)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 20])
def test_what_is_not_finite_stays_so(kernels, bad, place, monkeypatch):
    x, one = normal(0, 3, 21).astype(np.float32), np.ones(21, np.float32)
    x[1, place] = bad
    out, mean, rstd = np.zeros_like(x), np.zeros(3, np.float32), np.zeros(3, np.float32)
    kernels.norm_forward(out, mean, rstd, x, one, one)
    assert not np.isfinite(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    kernels.gelu_forward(out, x.copy(), np.zeros(21, np.float32))
    assert not np.isfinite(out[1, place])
    logits = x.copy()
    loss = kernels.cross_entropy(logits, np.array([2, 3, 4], np.int32), True)
    assert not np.isfinite(loss)
    out = np.zeros((3, 3), np.float32)
    with np.errstate(invalid="ignore"):
        kernels.product(out, x, x.T)
    assert not np.isfinite(out[1]).all()
    for own in (False, True):
        monkeypatch.setattr(kernels, "own_products", own)
        with np.errstate(invalid="ignore"):
            kernels.product_gelu(out, slope := np.zeros_like(out), x, np.ascontiguousarray(x.T), one[:3])
            kernels.product_slope(grown := np.zeros_like(out), np.zeros(3, np.float32), x, x.copy(), slope)
        assert not np.isfinite(out[1]).all()
        assert not np.isfinite(grown[1]).all()
    sums = np.zeros(1)
    kernels.block_sums(sums, x.reshape(-1), np.array([[0, x.size]], np.int64))
    assert not np.isfinite(sums[0])


def test_choices(monkeypatch):
    with pytest.raises(UsageError, match="expected one of"):
        load_kernels("fast")
    monkeypatch.setenv("HIERMPI_KERNELS", "plain")
    assert load_kernels().name == "plain"
    with using_kernels("numpy"):
        assert load_kernels().name == "numpy"
    assert load_kernels().name == "plain"
