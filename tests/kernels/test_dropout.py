"""Dropout bits: the same everywhere, and as good as random."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from hiermpi.kernels.layers import (
    element_bits,
    kept_factor,
    kept_scale,
    sequence_keys,
    splitmix64,
    threshold_of,
)

MANY = 1 << 17


def bits(count=MANY, *, seed=1, step=2, sequence=3, site=4):
    """The bits of one sequence's elements at one site."""
    key = sequence_keys(seed, step, np.array([sequence]), site)
    return element_bits(key, np.arange(count, dtype=np.uint32))


def correlation(a, b):
    """Between two masks at rate 1/2; within 5 / sqrt(n) where they are independent."""
    half = np.uint32(1 << 31)
    return np.mean((2.0 * (a >= half) - 1) * (2.0 * (b >= half) - 1))


# The definition, written a second time with plain integers: what any other implementation must reproduce.


def scalar_bits(element, key):
    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    return mix(mix(element ^ key % 2**32) ^ key >> 32)


def test_splitmix64_reference_values():
    """The published stream of seed 1234567: each state is the one before plus the golden gamma."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    assert [splitmix64(state) for state in states] == expected


def test_keys_chain_the_four_numbers():
    common = splitmix64(splitmix64(splitmix64(11) ^ 5) ^ 2)
    expected = [splitmix64(common ^ identity) for identity in (0, 9, 2**40)]
    keys = sequence_keys(11, 5, np.array([0, 9, 2**40]), 2)
    assert keys.dtype == np.uint64
    assert keys.tolist() == expected


def test_element_bits_bit_for_bit():
    keys = sequence_keys(1, 2, np.array([3, 4]), 5)
    elements = np.array([0, 1, 2, 63, 64, 12345, 2**31, 2**32 - 1], np.uint32)
    expected = [[scalar_bits(int(e), int(key)) for e in elements] for key in keys]
    assert element_bits(keys[:, None], elements).tolist() == expected


# Which elements are kept.


def test_threshold():
    assert threshold_of(0.0) == 0
    assert threshold_of(0.5) == 2**31
    assert threshold_of(0.1) == round(0.1 * 2**32)
    assert threshold_of(1 - 1e-12) == 2**32 - 1


def test_kept_factor_numbers_the_elements_in_c_order():
    keys, threshold = sequence_keys(1, 2, np.array([3, 4]), 5), threshold_of(0.3)
    factor = kept_factor(keys, (3, 2, 5), threshold, np.dtype(np.float32))
    assert (factor.shape, factor.dtype) == ((2, 3, 2, 5), np.float32)
    for b, key in enumerate(keys):
        kept = [scalar_bits(i, int(key)) >= threshold for i in range(30)]
        expected = np.where(kept, np.float32(1 / 0.7), np.float32(0))
        np.testing.assert_array_equal(factor[b].reshape(-1), expected)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_scale_keeps_the_mean(rate):
    scale = kept_scale(threshold_of(rate))
    assert scale == np.float32(scale)
    assert scale == pytest.approx(1 / (1 - rate), rel=1e-6)


def test_rate_zero_keeps_everything():
    factor = kept_factor(sequence_keys(1, 2, np.array([3]), 4), (1000,), 0, np.dtype(np.float32))
    np.testing.assert_array_equal(factor, 1.0)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sequence", [0, 1, 2**40])
def test_keep_rate(rate, sequence):
    dropped = (bits(sequence=sequence) < np.uint32(threshold_of(rate))).mean()
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / MANY)


# Independence.


@pytest.mark.parametrize("name", ["seed", "step", "sequence", "site"])
def test_masks_of_different_numbers_are_independent(name):
    masks = [bits(**{name: value}) for value in (0, 1, 2, 3, 64, 2**20)]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b)) < 5 / np.sqrt(MANY)


def test_the_four_numbers_are_not_exchangeable():
    orders = itertools.permutations((1, 2, 3, 4))
    ways = [bits(8, seed=s, step=t, sequence=q, site=e) for s, t, q, e in orders]
    assert len({tuple(way) for way in ways}) == 24


def test_a_sequence_has_one_mask_in_any_batch():
    ids = np.array([7, 2**40, 3])
    threshold, dtype = threshold_of(0.5), np.dtype(np.float32)
    together = kept_factor(sequence_keys(1, 2, ids, 4), (50,), threshold, dtype)
    for order in ([0], [2, 1], [1, 0, 2, 0]):
        part = kept_factor(sequence_keys(1, 2, ids[order], 4), (50,), threshold, dtype)
        np.testing.assert_array_equal(part, together[order])


@pytest.mark.parametrize("lag", [*range(1, 17), 64, 128, 256, 384, 4096])
def test_no_lattice_between_elements(lag):
    """Neighbours, and rows of the usual widths."""
    stream = bits()
    assert abs(correlation(stream[:-lag], stream[lag:])) < 5 / np.sqrt(MANY - lag)


@pytest.mark.parametrize("shift", [0, 12, 28])
def test_adjacent_pairs_fill_the_square(shift):
    """4 high, middle or low bits of an element and of the next: all 256 pairs as often."""
    digits = (bits() >> np.uint32(shift)) & np.uint32(15)
    pairs = np.bincount(16 * digits[::2] + digits[1::2], minlength=256)
    assert chisquare(pairs).pvalue > 1e-4


def test_runs_of_dropped_elements_are_geometric():
    dropped = bits() < np.uint32(1 << 31)
    edges = np.flatnonzero(np.diff(dropped.astype(np.int8)))
    lengths = np.bincount(np.minimum(np.diff(edges), 12), minlength=13)[1:]
    share = np.array([0.5**k for k in range(1, 12)] + [0.5**11])
    assert chisquare(lengths, share * lengths.sum()).pvalue > 1e-4


@pytest.mark.parametrize("bit", range(32))
def test_avalanche_of_the_element(bit):
    """Each bit of the number turns each of the 32 with probability 1/2."""
    key = sequence_keys(1, 2, np.array([3]), 4)
    elements = np.arange(1 << 14, dtype=np.uint32)
    turned = element_bits(key, elements) ^ element_bits(key, elements ^ np.uint32(1 << bit))
    share = [((turned >> np.uint32(out)) & np.uint32(1)).mean() for out in range(32)]
    np.testing.assert_allclose(share, 0.5, atol=6 * 0.5 / np.sqrt(len(elements)))


@pytest.mark.parametrize("bit", range(64))
def test_avalanche_of_the_key(bit):
    """Both halves of the key matter everywhere: over many elements each bit turns half of the time."""
    key = sequence_keys(1, 2, np.array([3]), 4)
    elements = np.arange(1 << 14, dtype=np.uint32)
    turned = element_bits(key, elements) ^ element_bits(key ^ np.uint64(1 << bit), elements)
    share = [((turned >> np.uint32(out)) & np.uint32(1)).mean() for out in range(32)]
    np.testing.assert_allclose(share, 0.5, atol=6 * 0.5 / np.sqrt(len(elements)))
