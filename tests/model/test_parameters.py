"""One vector, and named views into it."""

import numpy as np
import pytest

from hiermpi.kernels.memory import ALIGNMENT, aligned_empty
from hiermpi.model.parameters import ParameterBuffer, ParameterLayout, TensorSpec

SPECS = [
    TensorSpec("table", (5, 3), decay=True, symmetry_rows=True),
    TensorSpec("weight", (4, 8), decay=True),
    TensorSpec("bias", (7,)),
    TensorSpec("scale", (16,)),
]
OFFSETS = {"table": 0, "weight": 16, "bias": 48, "scale": 64}
SIZE = 80


@pytest.mark.parametrize("size", [1, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_aligned_empty(size, dtype):
    for _ in range(5):
        array = aligned_empty(size, dtype)
        assert (array.shape, array.dtype) == ((size,), dtype)
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_layout_puts_every_tensor_on_a_cache_line():
    layout = ParameterLayout(SPECS)
    assert layout.offsets == OFFSETS
    assert layout.size == SIZE
    assert layout.count == 15 + 32 + 7 + 16


def test_decay_ranges_are_maximal_runs_that_cover_the_vector():
    assert list(ParameterLayout(SPECS).decay_ranges()) == [(0, 48, True), (48, SIZE, False)]
    mixed = [SPECS[0], SPECS[2], SPECS[1]]
    assert list(ParameterLayout(mixed).decay_ranges()) == [(0, 16, True), (16, 32, False), (32, 64, True)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_buffer_starts_as_zeros_with_writable_views(dtype):
    buffer = ParameterBuffer(SPECS, dtype)
    assert (buffer.vector.shape, buffer.vector.dtype) == ((SIZE,), dtype)
    assert not buffer.vector.any()
    for index, spec in enumerate(SPECS):
        assert buffer[spec.name].shape == spec.shape
        assert buffer[spec.name].ctypes.data % ALIGNMENT == 0
        buffer[spec.name][...] = index + 1
    used = np.zeros(SIZE)
    for index, spec in enumerate(SPECS):
        used[OFFSETS[spec.name] : OFFSETS[spec.name] + spec.size] = index + 1
    np.testing.assert_array_equal(buffer.vector, used)  # so the padding is still zero


def test_layouts_of_all_types_agree():
    single, double = ParameterBuffer(SPECS, np.float32), ParameterBuffer(SPECS, np.float64)
    assert single.offsets == double.offsets
    assert single.size == double.size


def test_views_into_another_vector_share_its_memory():
    buffer = ParameterBuffer(SPECS)
    moments = buffer.new_vector()
    assert not moments.any()
    assert moments.ctypes.data % ALIGNMENT == 0
    buffer.views(moments)["bias"][2] = 5.0
    assert moments[OFFSETS["bias"] + 2] == 5.0
    assert not buffer.vector.any()


def test_storage_is_used_as_it_is():
    storage = np.arange(SIZE, dtype=np.float32)
    buffer = ParameterBuffer(SPECS, storage=[storage])
    assert buffer.vector is storage
    np.testing.assert_array_equal(buffer["bias"], np.arange(48, 55))


@pytest.mark.parametrize(
    "storage", [np.zeros(SIZE - 1, np.float32), np.zeros(SIZE), np.zeros((1, SIZE), np.float32)]
)
def test_storage_that_does_not_fit_is_refused(storage):
    with pytest.raises(ValueError, match=r"storage is .* expected float32\(80,\)"):
        ParameterBuffer(SPECS, storage=[storage])


def test_two_slots_take_turns():
    one, other = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
    buffer = ParameterBuffer(SPECS, storage=[one, other])
    for current, following in ((one, other), (other, one), (one, other)):
        assert buffer.vector is current
        assert buffer.next is following
        assert np.shares_memory(buffer["bias"], current)
        assert np.shares_memory(buffer.tensors["bias"], current)
        buffer.flip()


def test_one_slot_stays():
    buffer = ParameterBuffer(SPECS)
    assert buffer.next is buffer.vector
    tensor = buffer["bias"]
    buffer.flip()
    assert buffer.next is buffer.vector
    assert buffer["bias"] is tensor
