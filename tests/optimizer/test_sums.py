"""Fixed point: the compiled kernel against numpy, the bound of the error, and what must not be added."""

import math

import numpy as np
import pytest

from hiermpi.config.schema import Config, HierarchyConfig, ModelConfig, TrainConfig
from hiermpi.kernels import available_levels, load_kernels
from hiermpi.kernels.layers import ReferenceKernels
from hiermpi.optimizer.sums import (
    UNIT,
    differing,
    largest_addend,
    rounded_loss,
    unit_sequences,
)

FORMS = ["numpy", *available_levels()]


@pytest.fixture(params=FORMS)
def kernels(request):
    return load_kernels(request.param)


def values(n, seed=0):
    """Floats of every size that can be added, halves of the unit among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * 10.0 ** rng.integers(-14, 5, n)
    x[::7] = (rng.integers(-50, 50, len(x[::7])) + 0.5) * UNIT
    return x.astype(np.float32)


@pytest.mark.parametrize("n", [1, 7, 16, 33, 1000])
@pytest.mark.parametrize("fresh", [False, True])
def test_each_form_gives_the_same_bits(kernels, n, fresh):
    x, before = values(n), np.random.default_rng(1).integers(-(10**15), 10**15, n)
    expected = (0 if fresh else before) + np.array([round(float(v) / UNIT) for v in x])  # ties to even
    sums = before.copy()
    assert kernels.add_fixed(sums, x, UNIT, largest_addend(3), fresh)
    np.testing.assert_array_equal(sums, expected)
    out = np.empty(n, np.float32)
    kernels.from_fixed(out, sums, UNIT)
    np.testing.assert_array_equal(out, (expected.astype(np.float64) * UNIT).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**22, -(2.0**22), 3e38])
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_what_must_not_be_added_is_seen(kernels, bad, place):
    x = np.ones(37, np.float32)
    assert kernels.add_fixed(np.zeros(37, np.int64), x, UNIT, largest_addend(1), True)
    x[place] = bad
    assert not kernels.add_fixed(np.zeros(37, np.int64), x, UNIT, largest_addend(1), True)


def test_the_sum_of_the_largest_addends_does_not_wrap(kernels):
    for n_units in (1, 3, 480):
        limit = largest_addend(n_units)
        x = np.full(5, np.nextafter(np.float32(limit), np.float32(0)), np.float32)
        sums = np.zeros(5, np.int64)
        for _ in range(n_units):
            assert kernels.add_fixed(sums, x, UNIT, limit, False)
        assert (sums > 0).all()
        assert sums[0] * UNIT == pytest.approx(n_units * float(x[0]))


def test_no_less_exact_than_float32(kernels):
    """Forty gradients of a unit, against their exact sum."""
    parts = [np.random.default_rng(i).standard_normal(5000).astype(np.float32) * 1e-2 for i in range(40)]
    exact = np.array([math.fsum(float(part[i]) for part in parts) for i in range(5000)])
    single, fixed, out = np.zeros(5000, np.float32), np.zeros(5000, np.int64), np.empty(5000, np.float32)
    for part in parts:
        single += part
        kernels.add_fixed(fixed, part, UNIT, largest_addend(40), False)
    kernels.from_fixed(out, fixed, UNIT)
    for norm in (np.linalg.norm, lambda e: np.abs(e).max()):
        assert norm(out - exact) <= norm(single - exact)
    assert np.abs(fixed * UNIT - exact).max() <= 40 * UNIT / 2


def test_integers_are_summed_over_buffers(kernels):
    buffers = np.random.default_rng(0).integers(-(10**17), 10**17, (5, 3001))
    out = np.zeros(3001, np.int64)
    kernels.sum_buffers(out, buffers, 7, 2999)
    np.testing.assert_array_equal(out[7:2999], buffers.sum(axis=0)[7:2999])
    assert not out[:7].any()
    assert not out[2999:].any()


def test_units_depend_on_the_configuration_alone():
    def unit(batch, context, wanted=0):
        return unit_sequences(
            Config(
                model=ModelConfig(context_length=context),
                train=TrainConfig(batch_size=batch, micro_batch_size=wanted),
                hierarchy=HierarchyConfig(reproducible=True),
            )
        )

    assert [unit(26, 64), unit(12, 64), unit(48, 256), unit(480, 1024), unit(1000, 64)] == [2, 1, 2, 1, 8]
    assert unit(26, 64, 5) == 5


def test_losses_add_up_exactly():
    losses = [rounded_loss(float(v)) for v in np.random.default_rng(0).uniform(0, 5000, 1000)]
    assert len({float(np.sum(np.random.default_rng(i).permutation(losses))) for i in range(20)}) == 1
    assert math.isnan(rounded_loss(math.nan))


def test_the_first_rank_that_differs():
    assert differing(["a", "a", "b", "c"]) == (0, 2)
    assert differing(["a"]) is None


def test_reference_kernels_are_the_specification():
    assert isinstance(load_kernels("numpy"), ReferenceKernels)
