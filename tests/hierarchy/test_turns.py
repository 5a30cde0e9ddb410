"""How many compute at once: no fewer than the cores, and no core idle at the end."""

import pytest

from hiermpi.hierarchy.turns import at_once


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 48])
def test_no_core_is_left_idle(cores):
    for leaves in range(1, 200):
        ranks = at_once(leaves, cores)
        assert min(leaves, cores) <= ranks <= leaves
        last = leaves % ranks
        assert last == 0 or last >= cores
        assert all(0 < leaves % fewer < cores for fewer in range(cores, ranks))


def test_examples():
    assert [at_once(*case) for case in ((64, 2), (13, 2), (13, 8), (100, 48), (2, 2), (1, 4), (0, 2))] == [
        *(2, 5, 13, 50, 2, 1, 1)
    ]
