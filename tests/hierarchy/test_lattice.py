"""The lattice's gradient against finite differences and against the definition, neighbour by neighbour."""

import numpy as np
import pytest

from hiermpi.kernels import loops
from hiermpi.model.parameters import Lattice, SymmetryTable

TABLES = [
    (np.arange(24) % 12, 12),  # full shells, every partner
    (np.arange(29) % 12, 12),  # a ragged last shell, whose tokens of some classes have no partner
    (np.arange(5) % 12, 12),  # classes without a token
    (np.array([0, 0, 0, 1, 2, 2, 0, 1, 0]), 3),  # classes of unequal size
    (np.zeros(7, int), 1),  # partners only
    (np.array([3]), 4),  # nobody
]


def neighbours(groups):
    """{token: its neighbours}, straight from the definition."""
    place = {t: sum(groups[u] == groups[t] for u in range(t)) for t in range(len(groups))}
    return {
        t: [
            n
            for n in range(len(groups))
            if n != t
            and (
                (groups[n] != groups[t] and place[n] == place[t])
                or (groups[n] == groups[t] and place[n] == place[t] ^ 1)
            )
        ]
        for t in range(len(groups))
    }


@pytest.mark.parametrize(("groups", "order"), TABLES)
def test_loss_and_gradient_are_those_of_the_definition(groups, order):
    table = SymmetryTable(groups.astype(np.uint8), order)
    lattice = Lattice(table.class_bounds)
    embedding = np.random.default_rng(0).standard_normal((len(groups), 3))
    rows = embedding[table.token_of_row]
    gradient = np.full_like(rows, 2.0)
    loss = lattice.add_gradient(gradient, rows, 0.7).sum()
    known = neighbours(groups)
    expected = sum(np.square(embedding[t] - embedding[n]).sum() for t, near in known.items() for n in near)
    assert loss == pytest.approx(0.7 / 4 * expected)
    for t, near in known.items():
        pull = 0.7 * sum((embedding[t] - embedding[n] for n in near), np.zeros(3))
        np.testing.assert_allclose(gradient[table.row_of_token[t]] - 2.0, pull, atol=1e-12)


def test_finite_differences():
    groups = (np.arange(29) % 12).astype(np.uint8)
    lattice = Lattice(SymmetryTable(groups, 12).class_bounds)
    rows = np.random.default_rng(1).standard_normal((29, 2))
    gradient = np.zeros_like(rows)
    lattice.add_gradient(gradient, rows, 0.3)
    for index in np.ndindex(rows.shape):
        slopes = []
        for step in (1e-5, -1e-5):
            moved = rows.copy()
            moved[index] += step
            slopes.append(lattice.add_gradient(np.zeros_like(rows), moved, 0.3).sum())
        assert gradient[index] == pytest.approx((slopes[0] - slopes[1]) / 2e-5, abs=1e-7)


@pytest.mark.skipif(loops.compiled_loops() is None, reason="loops.c was not built")
@pytest.mark.parametrize("width", [1, 63, 64, 200])
@pytest.mark.parametrize(("groups", "order"), TABLES)
def test_the_compiled_form_does_the_same(groups, order, width, monkeypatch):
    lattice = Lattice(SymmetryTable(groups.astype(np.uint8), order).class_bounds)
    random = np.random.default_rng(width)
    rows = random.standard_normal((len(groups), width)).astype(np.float32)
    compiled = random.standard_normal(rows.shape).astype(np.float32)
    numpy = compiled.copy()
    losses = lattice.add_gradient(compiled, rows, 0.3)
    monkeypatch.setattr(loops, "compiled_loops", lambda: None)
    np.testing.assert_allclose(losses, lattice.add_gradient(numpy, rows, 0.3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compiled, numpy, rtol=1e-6, atol=1e-5)


def test_nobody_has_more_than_twelve_neighbours_and_all_agree():
    known = neighbours(np.arange(300) % 12)
    assert max(map(len, known.values())) == 12
    assert all(t in known[n] for t, near in known.items() for n in near)


def test_class_by_class_is_the_whole():
    lattice = Lattice(SymmetryTable((np.arange(29) % 12).astype(np.uint8), 12).class_bounds)
    rows = np.random.default_rng(2).standard_normal((29, 2)).astype(np.float32)
    whole, parts = np.zeros_like(rows), np.zeros_like(rows)
    losses = lattice.add_gradient(whole, rows, 0.3)
    each = sum(lattice.add_gradient(parts, rows, 0.3, {index}) for index in range(12))
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(losses, each)
