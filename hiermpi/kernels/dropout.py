"""Dropout bits as a counter hash: a function of (seed, step, sequence, site, element), never of a rank.

The key of a sequence at a site is a splitmix64 chain (Steele, Lea, Flood 2014) over the four numbers; element ``i``
under the key passes twice through Wellons' ``lowbias32`` mixer (2018, bias 0.17 over all input-output bit pairs),
keyed by either half. Integer arithmetic only, so numpy and C agree bit for bit.
"""

import numpy as np
from numpy.typing import NDArray

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
