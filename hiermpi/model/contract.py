"""This module defines what hiermpi asks of a model: it must satisfy :class:`Family` and :class:`Model`.

A family says which tensors a model has. hiermpi lays them out in one vector, in memory where they can be summed and
broadcast without copies, and the family makes a model on top of it. This is a complete family, a bigram model::

    import numpy as np
    from hiermpi import TensorSpec


    class Bigram:
        def __init__(self, config, parameters):
            self.parameters = parameters
            self.symmetry_order = config.symmetry_order

        def loss(self, batch):
            return self._pass(batch, None)

        def loss_and_gradients(self, batch, gradients):
            return self._pass(batch, self.parameters.views(gradients)["table"])

        def _pass(self, batch, gradient):
            known = batch.targets >= 0
            inputs, targets = batch.inputs[known], batch.targets[known]
            logits = self.parameters["table"][inputs]
            logits = logits - logits.max(axis=1, keepdims=True)
            p = np.exp(logits)
            p /= p.sum(axis=1, keepdims=True)
            rows = np.arange(len(targets))
            loss = -np.log(p[rows, targets]).sum(dtype=np.float64)
            if gradient is not None:
                p[rows, targets] -= 1
                np.add.at(gradient, inputs, p)
            return float(loss), len(targets)


    class BigramFamily:
        def specs(self, config):
            return [TensorSpec("table", (config.vocab_size, config.vocab_size), decay=True)]

        def make(self, config, parameters, sequences):
            return Bigram(config, parameters)

        def initialize(self, model, seed):
            table = model.parameters["table"]
            table[:] = 0.01 * np.random.default_rng(seed).standard_normal(table.shape)


    FAMILY = BigramFamily()

The option ``--model.family my_module:FAMILY`` chooses it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import FAMILIES, is_outside
from hiermpi.config.schema import ModelConfig
from hiermpi.errors import PluginError, UsageError, in_one_line, plugin_errors
from hiermpi.model.parameters import ParameterBuffer, TensorSpec

IGNORED_TARGET = -1
"""The target that marks padding: it is neither in the loss nor in the number of tokens."""
AUTOMATIC_MICRO_BATCH_TOKENS = 512
"""The tokens that are computed at once where ``train.micro_batch_size`` is 0: larger micro-batches leave the caches.
On a Xeon (2 MB of L2 a core) 2048 tokens take 3 to 14 % longer at widths of 128 to 384; no other number is more than
5 % faster."""


class Batch(NamedTuple):
    """A batch holds the sequences that one leaf computes at once.

    Ids are rows of the token table, which are token ids in another order (class-major): a model need not know which.
    """

    inputs: NDArray[np.int32]
    """(B, T) The rows of the token table that the inputs have."""
    targets: NDArray[np.int32]
    """(B, T) The rows of the targets, or :data:`IGNORED_TARGET` where there is nothing to predict."""
    sequence_ids: NDArray[np.int64]
    """(B,) The identity of each sequence within the data: with ``seed`` and ``step`` it keys all randomness."""
    seed: int
    """The seed of the run."""
    step: int
    """The number of steps finished before this one."""


class Model(Protocol):
    """A model that can be trained on the hierarchy.

    The results may depend on the batch and the parameters alone: not on the rank, the clock or earlier batches.
    """

    parameters: ParameterBuffer
    """The buffer that the family was given. A step may leave the parameters in another slot: take the tensors from here
    for every batch, as ``self.parameters["name"]``."""
    symmetry_order: int
    """The ``symmetry_order`` of the configuration."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        """Return the sum of the losses over the batch's targets, in nats, and the number of targets.

        Dropout is not applied.
        """

    def loss_and_gradients(self, batch: Batch, gradients: NDArray[np.float32]) -> tuple[float, int]:
        """Add the SUM of the targets' gradients to ``gradients``; return the loss sum and the number of targets.

        ``gradients`` is a flat vector of the parameters' layout; ``self.parameters.views(gradients)`` returns its
        tensors.
        """


@runtime_checkable
class WritingModel(Protocol):
    """A model that can write its gradients instead of adding them, which saves a pass over them (optional)."""

    def write_gradients(self, batch: Batch, gradients: NDArray[np.float32]) -> tuple[float, int]:
        """Overwrite ``gradients`` with what ``loss_and_gradients`` would add to zeros; padding becomes zero.

        It returns the loss sum and the number of targets.
        """


@runtime_checkable
class LendableModel(Protocol):
    """A model that can compute in memory which other ranks of its node use at other times (optional)."""

    def workspace_elements(self) -> int:
        """Return how many float32 elements of memory the model needs."""

    def share_workspaces(self, memories: Sequence[NDArray[np.float32]]) -> None:
        """Use these zeroed memories as workspaces from now on, and begin with the first."""

    def work_in(self, slot: int) -> None:
        """Use the shared workspace with the number ``slot`` from now on."""


@runtime_checkable
class LogitsModel(Protocol):
    """A model that returns its predictions (optional), which ``generate`` needs."""

    def logits(self, batch: Batch) -> NDArray[np.floating]:
        """Return the (B, T, V) logits, over rows of the table, of the token that follows each input.

        Dropout is not applied.
        """


class Decoder(Protocol):
    """A decoder extends one sequence by some tokens at a time."""

    def extend(self, rows: Sequence[int]) -> NDArray[np.floating]:
        """Append rows of the table to the sequence; return the (V,) logits, over rows, of the next one."""


@runtime_checkable
class DecodingModel(Protocol):
    """A model that generates text at the cost of the new tokens alone (optional)."""

    def decoder(self) -> Decoder:
        """Return a decoder whose sequence is empty."""


class Family(Protocol):
    """A family is a kind of model: an object with these methods.

    Two more methods are optional. ``flops_per_token(config) -> float`` returns the floating-point operations of the
    forward and backward pass per token, which ``plan`` and ``bench step`` use. ``workspace_bytes(config, sequences) ->
    int`` returns the bytes that a model needs to compute so many sequences at once, which ``plan`` uses. A family finds
    its own settings in ``config.options``.
    """

    def specs(self, config: ModelConfig) -> Sequence[TensorSpec]:
        """Return the specs of the tensors, in their order within the vector.

        It raises ValueError for settings that do not fit together.
        """

    def make(self, config: ModelConfig, parameters: ParameterBuffer, sequences: int) -> Model:
        """Make a model on top of ``parameters``.

        Args:
            config: The settings, with the vocabulary size resolved.
            parameters: The model's parameters, laid out by the family's specs but not yet initialised.
            sequences: The most sequences that should be computed at once; a batch may have more.
        """

    def initialize(self, model: Any, seed: int) -> None:
        """Fill the tensors of ``model.parameters`` with initial values, which depend on ``seed``.

        Row i of a tensor with ``symmetry_rows`` belongs to the token ``model.parameters.symmetry.token_of_row[i]``.
        """


def load_family(choice: Any) -> Family:
    """Load a family and check that it has what the contract asks for.

    Args:
        choice: A registered name, ``package.module:object``, or the family itself.

    Raises:
        UsageError: There is no such family.
        PluginError: The family lacks a method.
    """
    family = FAMILIES.load(choice) if isinstance(choice, str) else choice
    with plugin_errors(FAMILIES.blamed(choice)):
        family = family() if isinstance(family, type) else family
        for name in ("specs", "make", "initialize"):
            if not callable(getattr(family, name, None)):
                raise PluginError(
                    f"{FAMILIES.described(choice)}: it has no method {name}: a family needs specs, make and initialize"
                )
    return family


def outside_family(family: Family, config: ModelConfig) -> str:
    """Return how messages call a family from outside the package; nothing for one of the package's."""
    return FAMILIES.called(family, config.family)


def family_of(shape: ModelConfig, given: Any, source: Path) -> Family:
    """Return the family of a checkpoint's model.

    A registered one is used as the checkpoint names it. One from outside the package is never imported because a file
    names it: the user must give the same text, or the object.

    Args:
        shape: The model's settings in the checkpoint.
        given: What the user gave: a text, an object, or None.
        source: The checkpoint, for the message.
    """
    if given is not None and not isinstance(given, str):
        return load_family(given)
    if is_outside(shape.family) and given != shape.family:
        raise UsageError(
            f"the model in {source} is of the family {shape.family}, which is not a part of hiermpi: add "
            f"--model.family {shape.family} to have that code imported"
        )
    if given and given != shape.family:
        raise UsageError(f"--model.family {given}: the model in {source} is of the family {shape.family}")
    return load_family(shape.family)


def specs_of(family: Family, config: ModelConfig) -> list[TensorSpec]:
    """Return the tensors of a model. Raises UsageError, PluginError."""
    what = outside_family(family, config)
    with plugin_errors(what):
        try:
            specs = list(family.specs(config))
        except ValueError as error:  # the family refuses the user's settings
            raise UsageError(f"{what}: {in_one_line(error)}" if what else str(error)) from None
    if what:
        require_specs(what, specs, config)
    return specs


def require_specs(what: str, specs: Sequence[TensorSpec], config: ModelConfig) -> None:
    """Refuse tensors that cannot be. Raises PluginError.

    Args:
        what: How messages call the family.
        specs: The tensors.
        config: The model's settings.
    """
    if not specs or not all(isinstance(spec, TensorSpec) for spec in specs):
        raise PluginError(f"{what}: specs must return a list of TensorSpec, one for each tensor")
    for spec in specs:
        good = isinstance(spec.shape, tuple) and all(isinstance(size, int) and size > 0 for size in spec.shape)
        good = good and bool(spec.shape) and isinstance(spec.name, str) and bool(spec.name)
        if not good or not spec.name.isprintable() or "/" in spec.name:
            raise PluginError(f"{what}: the tensor {spec.name!r} of shape {spec.shape} cannot be stored")
        if spec.symmetry_rows and spec.shape[0] != config.vocab_size:
            raise PluginError(
                f"{what}: the tensor {spec.name} has symmetry_rows but {spec.shape[0]} rows: expected "
                f"one for each of the {config.vocab_size} tokens"
            )
    if len({spec.name for spec in specs}) < len(specs):
        raise PluginError(f"{what}: two tensors have the same name")


def make_model(family: Family, config: ModelConfig, parameters: ParameterBuffer, sequences: int) -> Any:
    """Make a model and check that it has what the contract asks for. Raises PluginError, MemoryError."""
    what = outside_family(family, config)
    with plugin_errors(what):
        model = family.make(config, parameters, sequences)
        for name in ("loss", "loss_and_gradients"):
            if not callable(getattr(model, name, None)):
                raise PluginError(f"{what}: its model has no method {name}")
        if getattr(model, "parameters", None) is not parameters:
            raise PluginError(f"{what}: its model must keep the given buffer as `parameters`")
    return model


def initialize(family: Family, config: ModelConfig, model: Any, seed: int) -> None:
    """Have a family fill the parameters of its model. Raises PluginError."""
    what = outside_family(family, config)
    with plugin_errors(what):
        family.initialize(model, seed)
    bad = [name for name, tensor in model.parameters.tensors.items() if not np.isfinite(tensor).all()] if what else []
    if bad:
        raise PluginError(f"{what}: initialize gives {bad[0]} a value that is not finite")


def figure_of(family: Family, name: str, config: ModelConfig, *others: Any) -> float:
    """Return a figure that a family gives of itself, such as ``flops_per_token``; 0 where it does not.

    Args:
        family: The family.
        name: The method that gives it.
        config: The model's settings.
        others: What the method is called with besides.

    Raises:
        PluginError: The method raised an exception, or returned something else.
    """
    counted, what = getattr(family, name, None), outside_family(family, config)
    if counted is None:
        return 0
    with plugin_errors(f"{what}: {name}" if what else ""):
        figure = counted(config, *others)
        if not 0 <= figure < float("inf"):
            raise PluginError(f"{what}: {name} returned {figure}: expected a number, 0 or more")
    return figure


def loss_of(model: Any, batch: Batch, what: str) -> tuple[float, int]:
    """Return the loss of a batch, and the number of its targets.

    Args:
        model: The model.
        batch: The batch.
        what: How messages call its family, where that comes from outside the package; else empty.

    Raises:
        PluginError: The model raised an exception, or returned something else.
    """
    with plugin_errors(what):
        result = model.loss(batch)
    return check_result(what, result, batch) if what else result


def check_result(what: str, result: Any, batch: Batch) -> tuple[float, int]:
    """Return what a model returned for ``batch``. Raises PluginError, which says ``what`` it is, where it cannot be."""
    expected = int((batch.targets >= 0).sum())
    try:
        loss, tokens = float(result[0]), int(result[1])
    except (TypeError, ValueError, IndexError):
        raise PluginError(f"{what}: expected (loss_sum, n_tokens), not {str(result)[:80]}") from None
    if tokens != expected:
        raise PluginError(f"{what}: it counted {tokens} targets where the batch has {expected}")
    return loss, tokens


def micro_batch_sequences(config: ModelConfig, wanted: int = 0) -> int:
    """Return how many sequences are computed at once: ``wanted``, or the automatic choice where it is 0."""
    return wanted or max(1, AUTOMATIC_MICRO_BATCH_TOKENS // config.context_length)
