"""The gradient norm does not depend on who holds which part of the vector."""

from math import inf, isnan, nan

import numpy as np
import pytest

from hiermpi.kernels import load_kernels, using_kernels
from hiermpi.model.parameters import ParameterLayout, TensorSpec
from hiermpi.optimizer import update
from hiermpi.optimizer.update import LARGEST_BLOCK, clip_scale, total_norm

SPECS = [
    TensorSpec("table", (50, 1000), decay=True, symmetry_rows=True),
    TensorSpec("weight", (130, 257), decay=True),
    TensorSpec("tiny", (3,)),
    TensorSpec("exact", (LARGEST_BLOCK,)),
]
BOUNDS = np.array([0, 7, 7, 30, 50])  # the second class is empty
LAYOUT = ParameterLayout(SPECS)


@pytest.fixture(autouse=True, params=sorted({load_kernels("numpy").name, load_kernels("auto").name}))
def kernels(request):
    """In numpy, and compiled where this installation has it."""
    with using_kernels(request.param):
        yield


def random_vector():
    """Padding is zero, as it always is."""
    vector = np.zeros(LAYOUT.size, np.float32)
    random = np.random.default_rng(0)
    for spec in SPECS:
        vector[LAYOUT.offsets[spec.name] :][: spec.size] = random.standard_normal(spec.size)
    return vector


def sums_of(vector, blocks):
    out = np.empty(len(blocks))
    load_kernels().block_sums(out, vector, blocks)
    return out


def norm_blocks(layout, class_bounds):
    """(n, 2) starts and stops."""
    bounds, _ = update.norm_blocks(layout, class_bounds)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


@pytest.mark.parametrize("class_bounds", [None, BOUNDS])
def test_blocks_cover_the_vector(class_bounds):
    bounds, classes = update.norm_blocks(LAYOUT, class_bounds)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, LAYOUT.size, len(classes) + 1)


def test_blocks_know_their_class():
    bounds, classes = update.norm_blocks(LAYOUT, BOUNDS)
    for start, symmetry_class in zip(bounds[:-1], classes, strict=True):
        row = start // 1000
        expected = np.searchsorted(BOUNDS, row, side="right") - 1 if start < 50 * 1000 else -1
        assert symmetry_class == expected


def test_blocks_are_small_and_in_order():
    blocks = norm_blocks(LAYOUT, BOUNDS)
    lengths = blocks[:, 1] - blocks[:, 0]
    assert lengths.min() > 0
    assert lengths.max() < LARGEST_BLOCK + 16  # a tensor's last has its padding
    assert (blocks[1:, 0] >= blocks[:-1, 1]).all()


def test_blocks_cross_neither_tensors_nor_classes():
    blocks = norm_blocks(LAYOUT, BOUNDS)
    edges = [LAYOUT.offsets[spec.name] for spec in SPECS] + [int(bound) * 1000 for bound in BOUNDS]
    for edge in edges:
        assert not ((blocks[:, 0] < edge) & (edge < blocks[:, 1])).any()


def test_the_norm():
    vector = random_vector()
    total = total_norm(sums_of(vector, norm_blocks(LAYOUT, BOUNDS)))
    used = np.concatenate([vector[LAYOUT.offsets[s.name] :][: s.size] for s in SPECS]).astype(np.float64)
    assert total == pytest.approx(np.linalg.norm(used), rel=1e-14)


def test_squares_are_added_in_double_precision():
    """In float32 the squares overflow, and the small one is lost."""
    vector = np.zeros(LAYOUT.size, np.float32)
    vector[0] = 1e30
    assert total_norm(sums_of(vector, norm_blocks(LAYOUT, BOUNDS))) == pytest.approx(1e30, rel=1e-6)
    vector[:2] = 2.0**13, 1.0
    assert sums_of(vector, norm_blocks(LAYOUT, BOUNDS))[0] == 2.0**26 + 1


def test_the_same_bits_however_the_blocks_are_dealt_out():
    vector, blocks = random_vector(), norm_blocks(LAYOUT, BOUNDS)
    whole = sums_of(vector, blocks)
    for owners in (2, 3, 5):
        dealt = np.empty(len(blocks))
        for owner in range(owners):
            mine = np.ascontiguousarray(blocks[owner::owners])
            dealt[owner::owners] = sums_of(vector.copy(), mine)
        np.testing.assert_array_equal(dealt, whole)
        assert total_norm(dealt) == total_norm(whole)


def test_the_same_bits_wherever_a_slice_lies_in_memory():
    blocks = norm_blocks(LAYOUT, BOUNDS)
    vector, room = random_vector(), np.empty(LAYOUT.size + 3, np.float32)
    for shift in (1, 2, 3):
        moved = room[shift : shift + LAYOUT.size]
        moved[:] = vector
        np.testing.assert_array_equal(sums_of(moved, blocks), sums_of(vector, blocks))


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_bad_element_anywhere_makes_the_norm_not_finite(bad):
    blocks = norm_blocks(LAYOUT, BOUNDS)
    for start, stop in blocks:
        for place in (start, stop - 1):
            vector = np.zeros(LAYOUT.size, np.float32)
            vector[place] = bad
            assert isnan(total_norm(sums_of(vector, blocks)))


def test_clip_scale():
    assert clip_scale(4.0, 1.0) == 0.25
    assert clip_scale(1.0, 1.0) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0


def test_a_limit_of_zero_never_clips():
    assert clip_scale(1e30, 0.0) == 1.0


@pytest.mark.parametrize("limit", [0.1, 1.0, 7.3])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e6])
def test_a_clipped_norm_is_within_the_limit(length, limit):
    assert length * clip_scale(length, limit) <= limit * (1 + 1e-15) or length <= limit
    assert length * clip_scale(length, limit) == pytest.approx(min(length, limit))
