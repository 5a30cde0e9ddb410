"""The optimizer's slots: an update reads one and writes the other, and the commit puts it in its place."""

import numpy as np
import pytest

from hiermpi.config.schema import OptimizerConfig
from hiermpi.hierarchy.ownership import owned_by_root
from hiermpi.model.parameters import ParameterBuffer, TensorSpec
from hiermpi.optimizer.rules import RULE, cosine
from hiermpi.optimizer.update import Optimizer, OptimizerSettings

SIZE = 640


def made(slots):
    """An optimizer of ones, and its parameters."""
    storage = [np.ones(SIZE, np.float32), np.full(SIZE, np.nan, np.float32)][:slots]
    parameters = ParameterBuffer([TensorSpec("w", (64, 10), decay=True)], storage=storage)
    states = [{name: np.zeros(SIZE, np.float32) for name in RULE.state} for _ in range(slots)]
    settings = OptimizerSettings(OptimizerConfig(), grad_clip=1.0, steps=10, schedule=cosine)
    return Optimizer(parameters, settings, states, owned_by_root(SIZE), 0, RULE), parameters


def gradients(step):
    return np.random.default_rng(step).standard_normal(SIZE).astype(np.float32)


def state(optimizer, parameters):
    return [optimizer.updates, *(array.copy() for array in (parameters.vector, *optimizer.state.values()))]


@pytest.mark.parametrize("slots", [1, 2])
def test_updates_do_not_depend_on_the_slots(slots):
    optimizer, parameters = made(slots)
    expected, reference = made(1)
    for step in range(5):
        for one, its in ((optimizer, parameters), (expected, reference)):
            one.update(gradients(step), 7, 2.5, step)
            its.flip()
            one.commit()
    for ours, theirs in zip(state(optimizer, parameters), state(expected, reference), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert optimizer.updates == 5


def test_an_update_that_is_not_committed_leaves_no_trace():
    optimizer, parameters = made(2)
    optimizer.update(gradients(0), 7, 2.5, 0)
    parameters.flip()
    optimizer.commit()
    before = state(optimizer, parameters)
    optimizer.update(gradients(1), 7, 2.5, 1)
    for ours, theirs in zip(state(optimizer, parameters), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(parameters.next, parameters.vector)
