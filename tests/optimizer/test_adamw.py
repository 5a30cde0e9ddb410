"""AdamW: matches the textbook, bit for bit the same however it is cut, and it converges."""

from itertools import pairwise

import numpy as np
import pytest

from hiermpi.kernels import load_kernels
from hiermpi.kernels.layers import ADAMW_BLOCK as BLOCK
from hiermpi.kernels.memory import ALIGNMENT
from hiermpi.optimizer.rules import AdamW, Hyper, Values

UNIT = ALIGNMENT // 4
N = 3 * BLOCK + 5 * UNIT  # not a whole number of blocks
SPLIT = BLOCK + 7 * UNIT  # decayed before, not after
SETTINGS = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "scale": 0.25}


@pytest.fixture(params=sorted({load_kernels("numpy").name, load_kernels("auto").name}))
def kernels(request):
    """In numpy, and compiled where this installation has it."""
    return load_kernels(request.param)


def random_state(n=N):
    """Parameters, gradients, first and second moments."""
    parameters, gradients, m, v = np.random.default_rng(0).standard_normal((4, n)).astype(np.float32)
    return parameters, gradients, m, v**2


def update(kernels, state, count=1, ranges=((0, SPLIT, True), (SPLIT, N, False)), out=None, **changes):
    """(parameters, m, v) after one update, in new arrays unless ``out`` names some."""
    out = out or tuple(np.full_like(state[0], np.nan) for _ in range(3))
    numbers = SETTINGS | changes
    parameters, gradients, m, v = state
    for start, stop, decay in ranges:
        part = slice(start, stop)
        new, old = ((x[part], {"m": y[part], "v": z[part]}) for x, y, z in (out, (parameters, m, v)))
        hyper = Hyper(
            count,
            numbers["learning_rate"],
            numbers["scale"],
            numbers["weight_decay"] if decay else 0.0,
            numbers["beta1"],
            numbers["beta2"],
            {},
            None,
        )
        AdamW(kernels).update(Values(*new), Values(*old), gradients[part], hyper)
    return out


def textbook(state, count, *, learning_rate, beta1, beta2, weight_decay, scale, eps=1e-8):
    """Algorithm 2 of Loshchilov and Hutter in float64, with decay before SPLIT only."""
    theta, g, m, v = (array.astype(np.float64) for array in state)
    g *= scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**count), v / (1 - beta2**count)
    decay = np.where(np.arange(len(g)) < SPLIT, weight_decay, 0.0)
    return theta - learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * theta), m, v


def test_matches_the_textbook_over_several_steps(kernels):
    parameters, _, m, v = random_state()
    m[:], v[:] = 0, 0
    expected = parameters, m, v
    actual = tuple(array.copy() for array in expected)
    for count in range(1, 6):
        gradients = np.random.default_rng(count).standard_normal(N).astype(np.float32)
        expected = textbook((expected[0], gradients, *expected[1:]), count, **SETTINGS)
        actual = update(kernels, (actual[0], gradients, *actual[1:]), count)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, 7, 100_000])
def test_matches_the_textbook_from_any_state(kernels, count):
    state = random_state()
    for a, b in zip(update(kernels, state, count), textbook(state, count, **SETTINGS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_is_bitwise_deterministic(kernels):
    for a, b in zip(update(kernels, random_state()), update(kernels, random_state()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reads_one_slot_and_writes_another(kernels):
    state, before = random_state(), random_state()
    update(kernels, state)
    for a, b in zip(state, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_in_place_gives_the_same_bits(kernels):
    parameters, gradients, m, v = random_state()
    expected = update(kernels, (parameters, gradients, m, v))
    actual = update(kernels, (parameters, gradients, m, v), out=(parameters, m, v))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


CUTS = [[BLOCK], [UNIT, 2 * UNIT, 5 * UNIT], [BLOCK - UNIT, SPLIT + 3 * UNIT, N - UNIT]]


@pytest.mark.parametrize("cuts", CUTS)
def test_slices_give_the_same_bits_as_the_whole(kernels, cuts):
    state = random_state()
    whole = update(kernels, state)
    bounds = sorted([0, *cuts, SPLIT, N])
    for start, stop in pairwise(bounds):
        part = [array[start:stop].copy() for array in state]
        sliced = update(kernels, part, ranges=((0, stop - start, start < SPLIT),))
        for a, b in zip(sliced, whole, strict=True):
            np.testing.assert_array_equal(a, b[start:stop])


def test_decay_applies_in_its_ranges_only(kernels):
    parameters = random_state()[0]
    zero = np.zeros_like(parameters)
    after, _, _ = update(kernels, (parameters, zero, zero, zero))
    np.testing.assert_array_equal(after[SPLIT:], parameters[SPLIT:])
    shrink = 1 - SETTINGS["learning_rate"] * SETTINGS["weight_decay"]
    np.testing.assert_allclose(after[:SPLIT], parameters[:SPLIT] * shrink, rtol=1e-6)


def test_nothing_outside_the_ranges_is_written(kernels):
    after = update(kernels, random_state(), ranges=((UNIT, 3 * UNIT, True),))
    for array in after:
        assert np.isnan(array[:UNIT]).all()
        assert np.isfinite(array[UNIT : 3 * UNIT]).all()
        assert np.isnan(array[3 * UNIT :]).all()


def test_padding_stays_zero(kernels):
    zero = np.zeros(N, np.float32)
    for array in update(kernels, (zero, zero, zero, zero)):
        np.testing.assert_array_equal(array, 0.0)


def test_scale_is_a_factor_on_the_gradients(kernels):
    parameters, gradients, m, v = random_state()
    quartered = (parameters, gradients * np.float32(0.25), m, v)
    for a, b in zip(
        update(kernels, (parameters, gradients, m, v)), update(kernels, quartered, scale=1.0), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_first_step_is_the_learning_rate_long(kernels):
    """With no moments yet, Adam's step is the sign of the gradient times the rate."""
    zero = np.zeros(N, np.float32)
    gradients = np.random.default_rng(0).choice([-3.0, -0.1, 0.1, 3.0], N).astype(np.float32)
    after, _, _ = update(kernels, (zero, gradients, zero, zero))
    np.testing.assert_allclose(after, -SETTINGS["learning_rate"] * np.sign(gradients), rtol=1e-3)


def test_converges(kernels):
    """To the minimum of a badly scaled quadratic."""
    goal = np.linspace(-2, 2, 64, dtype=np.float32)
    stiffness = np.logspace(-2, 2, 64, dtype=np.float32)
    state = tuple(np.zeros(64, np.float32) for _ in range(3))
    for count in range(1, 1001):
        gradients = stiffness * (state[0] - goal)
        rate = 0.02 * (1 - count / 1001)
        state = update(
            kernels,
            (state[0], gradients, *state[1:]),
            count,
            ranges=((0, 64, False),),
            learning_rate=rate,
            scale=1.0,
        )
    np.testing.assert_allclose(state[0], goal, atol=2e-3)
