"""This module defines what hiermpi asks of an optimizer rule, and the schedules of the learning rate.

A rule is pure arithmetic on vectors: it knows no rank, no file and no clock. It names the state that it keeps; hiermpi
allocates that state at the parameters' owners, saves it by its names, and calls the rule for one piece after another.
The division by the tokens and the clipping are one factor, ``hyper.scale``. This is a complete rule, Lion (Chen et al.
2023)::

    import numpy as np


    class Lion:
        state = ("momentum",)

        def update(self, new, old, gradients, hyper):
            g = gradients * np.float32(hyper.scale)
            m = old.state["momentum"]
            direction = np.sign(hyper.beta1 * m + (1 - hyper.beta1) * g)
            new.state["momentum"][:] = hyper.beta2 * m + (1 - hyper.beta2) * g
            decay = hyper.weight_decay * old.parameters
            new.parameters[:] = old.parameters - hyper.learning_rate * (direction + decay)


    RULE = Lion()

The option ``--optimizer.rule my_module:RULE`` chooses it.
"""

from collections.abc import Mapping, Sequence
from math import cos, isfinite, pi, sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import RULES, SCHEDULES
from hiermpi.errors import PluginError, plugin_errors
from hiermpi.kernels import Kernels, load_kernels
from hiermpi.model.parameters import TensorSpec

Vector = NDArray[np.float32]


class Values(NamedTuple):
    """A piece of the parameters with the same piece of each vector of the rule's state, all of one length."""

    parameters: Vector
    state: Mapping[str, Vector]


class Hyper(NamedTuple):
    """The numbers of one update."""

    count: int  # type: ignore[assignment]
    """The number of updates applied, this one included: Adam's t."""
    learning_rate: float
    """The learning rate of this step."""
    scale: float
    """The factor that turns the given gradient SUM into the clipped mean gradient."""
    weight_decay: float
    """The value of ``optimizer.weight_decay`` where the piece decays, else 0."""
    beta1: float
    """The value of ``optimizer.beta1``."""
    beta2: float
    """The value of ``optimizer.beta2``."""
    options: Mapping[str, Any]
    """The settings in ``optimizer.options``, for rules from outside the package."""
    shape: tuple[int, ...] | None
    """The shape of the tensor where the rule asked for whole tensors, else None."""


class Rule(Protocol):
    """A rule updates parameters.

    Two methods are optional. ``needs_whole(spec) -> bool`` tells for which tensors (:class:`hiermpi.TensorSpec`) one
    owner must hold the whole tensor; such a tensor is a piece of its own, with ``hyper.shape``. ``rule_of(spec) ->
    Rule`` leaves a tensor to another rule; ``state`` must then have the names of both.
    """

    state: tuple[str, ...]
    """The names of the rule's vectors, such as ``("m", "v")``, ``("momentum",)`` or ``()``; they begin as zeros."""

    def update(self, new: Values, old: Values, gradients: Vector, hyper: Hyper) -> None:
        """Write one piece of the parameters and of the state.

        Args:
            new: The vectors to write, every element of them; they may be the same memory as ``old``.
            old: The vectors to read.
            gradients: The sum of the gradients over all tokens of the step, which must not be changed.
            hyper: The numbers of this update.
        """


def load_rule(choice: Any) -> Rule:
    """Load a rule and check that it has what the contract asks for.

    Args:
        choice: A registered name, ``package.module:object``, or the rule itself.

    Raises:
        UsageError: There is no such rule.
        PluginError: The rule breaks its contract.
    """
    rule = RULES.load(choice) if isinstance(choice, str) else choice
    name = RULES.described(choice)
    with plugin_errors(RULES.blamed(choice)):
        rule = rule() if isinstance(rule, type) else rule
        require_rule(name, rule)
    return rule


def require_rule(name: str, rule: Any) -> None:
    """Refuse what does not have the method and the state of a rule. Raises PluginError.

    Args:
        name: How messages call it.
        rule: The rule.
    """
    if not callable(getattr(rule, "update", None)):
        raise PluginError(f"{name}: it has no method update")
    state = getattr(rule, "state", None)
    names = state if isinstance(state, tuple) else None
    good = names is not None and all(isinstance(name, str) and name.isidentifier() for name in names)
    if names is None or not good or len(set(names)) < len(names):
        raise PluginError(
            f"{name}: its `state` must be a tuple of distinct names, such as ('momentum',), not {state!r}"
        )


def require_fit(rule: Rule, choice: Any, specs: Sequence[TensorSpec]) -> None:
    """Refuse a rule from outside whose answers about the tensors of a model cannot be. Raises PluginError.

    Args:
        rule: The rule.
        choice: What the user calls it.
        specs: The tensors.
    """
    name = RULES.called(rule, choice)
    if not name:
        return
    for spec in specs:
        with plugin_errors(f"{name}: the tensor {spec.name}"):
            chosen = rule_of(rule, spec)
            require_rule(f"{name}: the rule of the tensor {spec.name}", chosen)
            missing = sorted(set(chosen.state) - set(rule.state))
            if missing:
                raise PluginError(
                    f"{name}: the rule of the tensor {spec.name} keeps {', '.join(missing)}, which `state` does not "
                    "name"
                )
            needs_whole(chosen, spec)


def needs_whole(rule: Rule, spec: TensorSpec) -> bool:
    """Tell whether ``rule`` needs this tensor whole at one owner."""
    asked = getattr(rule, "needs_whole", None)
    return bool(asked(spec)) if asked else False


def rule_of(rule: Rule, spec: TensorSpec) -> Rule:
    """Return the rule that updates this tensor: ``rule`` itself, or the one to which it leaves the tensor."""
    asked = getattr(rule, "rule_of", None)
    return asked(spec) if asked else rule


class Schedule(Protocol):
    """A schedule is the learning rate as a function of the step alone, so that a resume needs no state of it."""

    def __call__(
        self, step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
    ) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones.

        Args:
            step: The number of steps finished before; step 0 already has a rate above zero.
            learning_rate: The highest rate.
            min_learning_rate: The rate after the decay.
            warmup_steps: The number of steps of linear warm-up.
            decay_steps: The step at which the decay ends, warm-up included.
        """


def load_schedule(choice: Any) -> Schedule:
    """Load a schedule by its name, ``package.module:object`` or the function itself. Raises UsageError, PluginError."""
    schedule = SCHEDULES.load(choice) if isinstance(choice, str) else choice
    name = SCHEDULES.blamed(choice)
    if not name:
        return schedule
    if not callable(schedule):
        raise PluginError(f"{name}: it is not a function of the step")
    return OutsideSchedule(schedule, name)


class OutsideSchedule:
    """A schedule from outside; what it raises or breaks is told in one sentence that names it.

    Args:
        schedule: The schedule.
        name: How messages call it.
    """

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule = schedule
        self.name = name

    def __call__(
        self, step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
    ) -> float:
        with plugin_errors(self.name):
            rate = self.schedule(
                step,
                learning_rate=learning_rate,
                min_learning_rate=min_learning_rate,
                warmup_steps=warmup_steps,
                decay_steps=decay_steps,
            )
            if not isfinite(rate) or rate < 0:
                raise PluginError(f"{self.name}: its rate after {step} steps is {rate}: expected 0 or more")
        return float(rate)


def cosine(
    step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
) -> float:
    """Return a rate that warms up linearly, then falls along half a cosine to the minimum.

    The formula is that of Loshchilov and Hutter 2017 in nanoGPT's form; :class:`Schedule` describes the arguments.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return min_learning_rate
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_learning_rate + 0.5 * (1.0 + cos(pi * progress)) * (learning_rate - min_learning_rate)


def linear(
    step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
) -> float:
    """Return a rate that warms up linearly, then falls linearly to the minimum; see :class:`Schedule`."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return min_learning_rate
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return learning_rate + progress * (min_learning_rate - learning_rate)


def constant(
    step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
) -> float:
    """Return a rate that warms up linearly, then stays at its peak; see :class:`Schedule`."""
    return learning_rate * (step + 1) / (warmup_steps + 1) if step < warmup_steps else learning_rate


EPSILON = 1e-8


class AdamW:
    """The rule AdamW (Loshchilov, Hutter 2019).

    Args:
        kernels: The kernels that compute it; by default those of the environment at the time of the update.
    """

    state = ("m", "v")

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = kernels

    def with_kernels(self, kernels: Kernels) -> "AdamW":
        """Return the same rule, computed by these kernels."""
        return AdamW(kernels)

    def update(self, new: Values, old: Values, gradients: Vector, hyper: Hyper) -> None:
        kernels = self.kernels or load_kernels()
        written = (new.parameters, new.state["m"], new.state["v"])
        kernels.adamw(
            (*written, old.parameters, gradients, old.state["m"], old.state["v"]),
            hyper.scale,
            hyper.beta1,
            hyper.beta2,
            hyper.learning_rate / (1.0 - hyper.beta1**hyper.count),
            1.0 / sqrt(1.0 - hyper.beta2**hyper.count),
            EPSILON,
            1.0 - hyper.learning_rate * hyper.weight_decay,
        )


RULE = AdamW()
