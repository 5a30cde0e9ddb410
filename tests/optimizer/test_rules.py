"""What is asked of an optimizer rule and a schedule from outside."""

import numpy as np
import pytest

from hiermpi.config.schema import OptimizerConfig
from hiermpi.errors import PluginError
from hiermpi.hierarchy.ownership import assign
from hiermpi.hierarchy.topology import Topology
from hiermpi.model.parameters import ParameterBuffer, TensorSpec
from hiermpi.optimizer.rules import RULE, load_rule, load_schedule, require_fit
from hiermpi.optimizer.update import Optimizer, OptimizerSettings, norm_blocks

SPECS = [TensorSpec("matrix", (4, 8), decay=True), TensorSpec("bias", (8,))]
SETTINGS = {"learning_rate": 0.1, "min_learning_rate": 0.01, "warmup_steps": 0, "decay_steps": 9}


class Plain:
    """Gradient descent without state."""

    state = ()

    def update(self, new, old, gradients, hyper):
        new.parameters[:] = old.parameters - hyper.learning_rate * hyper.scale * gradients


class Counted(Plain):
    """Remembers what it was given."""

    def __init__(self):
        self.shapes = []

    def needs_whole(self, spec):
        return len(spec.shape) > 1

    def update(self, new, old, gradients, hyper):
        self.shapes.append((hyper.shape, len(gradients)))
        super().update(new, old, gradients, hyper)


class Divided(Plain):
    """Leaves vectors to AdamW."""

    state = ("m", "v")

    def rule_of(self, spec):
        return RULE if len(spec.shape) == 1 else Plain()


def make_optimizer(rule, name="optimizer.rule = mine:RULE", slots=1):
    """Make the optimizer of one owner for everything."""
    parameters = ParameterBuffer(SPECS, storage=[np.zeros(48, np.float32) for _ in range(slots)])
    bounds, classes = norm_blocks(parameters)
    ownership = assign(bounds, classes, Topology(1), "root", None)
    settings = OptimizerSettings(OptimizerConfig(learning_rate=0.5), 0.0, 10, load_schedule("constant"))
    states = [{key: np.zeros(parameters.size, np.float32) for key in rule.state} for _ in range(slots)]
    return Optimizer(parameters, settings, states, ownership, 0, rule, name=name)


def test_a_class_is_made_into_a_rule():
    assert isinstance(load_rule(Plain), Plain)
    assert load_rule("adamw") is RULE


@pytest.mark.parametrize("slots", [1, 2])
def test_each_piece_is_given_to_its_rule(slots):
    rule = Counted()
    optimizer = make_optimizer(rule, slots=slots)
    gradients = np.ones(optimizer.parameters.size, np.float32)
    optimizer.update(gradients, 2, 1.0, 0)
    assert rule.shapes[0] == ((4, 8), 32)
    assert {shape for shape, _ in rule.shapes[1:]} == {None}
    assert sum(length for _, length in rule.shapes) == optimizer.parameters.size
    rate = 0.5 / (OptimizerConfig().warmup_steps + 1)
    np.testing.assert_allclose(optimizer.parameters.slots[-1], np.full(optimizer.parameters.size, -rate / 2), rtol=1e-6)


def test_tensors_go_to_the_rules_that_they_are_left_to():
    optimizer = make_optimizer(Divided())
    optimizer.update(np.ones(optimizer.parameters.size, np.float32), 1, 1.0, 0)
    assert optimizer.state["m"][32:40].all()
    assert not optimizer.state["m"][:32].any()


class Raising(Plain):
    def update(self, new, old, gradients, hyper):
        raise KeyError("a\nb")


class Returning(Plain):
    def update(self, new, old, gradients, hyper):
        return old.parameters - gradients


class Overwriting(Plain):
    def update(self, new, old, gradients, hyper):
        gradients[:] = 0


class Backwards(Plain):
    def update(self, new, old, gradients, hyper):
        old.parameters[:] = 0


class Options(Plain):
    def update(self, new, old, gradients, hyper):
        hyper.options["momentum"] = 1


class Infinite(Plain):
    state = ("memory",)

    def update(self, new, old, gradients, hyper):
        new.state["memory"][-1] = np.inf


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Raising, "KeyError"),
        (Returning, "update returned ndarray: it must write into `new`"),
        (Overwriting, "read-only"),
        (Backwards, "read-only"),
        (Options, "TypeError"),
        (Infinite, "it made memory that are not finite"),
    ],
)
def test_an_update_that_breaks_the_contract_is_named(rule, words):
    optimizer = make_optimizer(rule())
    with pytest.raises(PluginError, match=f"^optimizer.rule = mine:RULE: .*{words}") as caught:
        optimizer.update(np.ones(optimizer.parameters.size, np.float32), 1, 1.0, 0)
    assert "\n" not in str(caught.value)


class Wrong(Plain):
    def rule_of(self, spec):
        return RULE


class Silly(Plain):
    def needs_whole(self, spec):
        return spec.size / 0


@pytest.mark.parametrize(
    ("rule", "words"),
    [(Wrong, "the rule of the tensor matrix keeps m, v, which `state` does not name"), (Silly, "ZeroDivisionError")],
)
def test_answers_about_tensors_are_checked_before_work(rule, words):
    with pytest.raises(PluginError, match=words):
        require_fit(rule(), "mine:RULE", SPECS)
    require_fit(Divided(), "mine:RULE", SPECS)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda _step, **_others: float("inf"), "its rate after 3 steps is inf"),
        (lambda _step, **_others: -0.5, "its rate after 3 steps is -0.5"),
        (lambda _step, **_others: "fast", "TypeError"),
        (lambda: 0.5, "TypeError"),
        (7, "not a function"),
    ],
)
def test_a_schedule_that_breaks_the_contract_is_named(schedule, words):
    with pytest.raises(PluginError, match=words):
        load_schedule(schedule)(3, **SETTINGS)


def test_a_schedule_from_outside_is_asked():
    assert load_schedule(lambda step, *, learning_rate, **_others: learning_rate / (1 + step))(3, **SETTINGS) == 0.025
