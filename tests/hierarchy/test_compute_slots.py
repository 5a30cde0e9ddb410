"""How many compute at once: no fewer than the cores, and no core idle for long at the end."""

import pytest

from hiermpi.hierarchy.topology import compute_slots


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 48])
def test_no_core_is_left_idle(cores):
    for leaves in range(1, 200):
        ranks = compute_slots(leaves, cores)
        assert min(leaves, cores) <= ranks <= leaves
        last = leaves % ranks
        if ranks == cores:
            assert -(-leaves // cores) * cores <= 1.1 * leaves
        else:
            assert last == 0 or last >= cores
            assert all(0 < leaves % fewer < cores for fewer in range(cores, ranks))


def test_examples():
    of_two_cores = [compute_slots(leaves, 2) for leaves in (0, 1, 2, 3, 7, 13, 64)]
    assert of_two_cores == [1, 1, 2, 3, 4, 2, 2]
    assert [compute_slots(1, 4), compute_slots(13, 8), compute_slots(100, 48)] == [1, 13, 50]
