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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.registry import FAMILIES
from hiermpi.config.schema import ModelConfig
from hiermpi.errors import PluginError, UsageError
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
    for name in ("specs", "make", "initialize"):
        if not callable(getattr(family, name, None)):
            raise PluginError(
                f"model.family = {choice}: it has no method {name}: a family needs specs, make and initialize"
            )
    return family


def specs_of(family: Family, config: ModelConfig) -> list[TensorSpec]:
    """Return the checked specs of a model's tensors. Raises UsageError, PluginError."""
    name = config.family
    try:
        specs = list(family.specs(config))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not specs or not all(isinstance(spec, TensorSpec) for spec in specs):
        raise PluginError(f"model.family = {name}: specs must return a list of TensorSpec, one for each tensor")
    for spec in specs:
        whole = all(isinstance(size, int) and size > 0 for size in spec.shape)
        if not spec.shape or not whole or not spec.name.isprintable() or "/" in spec.name or not spec.name:
            raise PluginError(f"model.family = {name}: the tensor {spec.name!r} of shape {spec.shape} cannot be stored")
        if spec.symmetry_rows and spec.shape[0] != config.vocab_size:
            raise PluginError(
                f"model.family = {name}: the tensor {spec.name} has symmetry_rows but {spec.shape[0]} rows: expected "
                f"one for each of the {config.vocab_size} tokens"
            )
    if len({spec.name for spec in specs}) < len(specs):
        raise PluginError(f"model.family = {name}: two tensors have the same name")
    return specs


def make_model(family: Family, config: ModelConfig, parameters: ParameterBuffer, sequences: int) -> Any:
    """Make a model and check that it has what the contract asks for.

    Args:
        family: The family of the model.
        config: The settings, with the vocabulary size resolved.
        parameters: The model's parameters, not yet initialised.
        sequences: The most sequences that should be computed at once.

    Raises:
        PluginError: The model breaks the contract.
        MemoryError: There is not enough memory for it.
    """
    model = family.make(config, parameters, sequences)
    for name in ("loss", "loss_and_gradients"):
        if not callable(getattr(model, name, None)):
            raise PluginError(f"model.family = {config.family}: its model has no method {name}")
    if getattr(model, "parameters", None) is not parameters:
        raise PluginError(f"model.family = {config.family}: its model must keep the given buffer as `parameters`")
    return model


def check_result(name: str, result: Any, batch: Batch) -> tuple[float, int]:
    """Return a model's result as a float and an int, and check it against the batch.

    Args:
        name: The name of the model's family, for messages.
        result: What the model returned: the loss sum and the number of targets.
        batch: The batch that the model computed.

    Raises:
        PluginError: The result is not of that form, or its number of targets is wrong.
    """
    expected = int((batch.targets >= 0).sum())
    try:
        loss, tokens = float(result[0]), int(result[1])
    except (TypeError, ValueError, IndexError):
        raise PluginError(f"model.family = {name}: expected (loss_sum, n_tokens), not {str(result)[:80]}") from None
    if tokens != expected:
        raise PluginError(f"model.family = {name}: it counted {tokens} targets where the batch has {expected}")
    return loss, tokens


def micro_batch_sequences(config: ModelConfig, wanted: int = 0) -> int:
    """Return how many sequences are computed at once: ``wanted``, or the automatic choice where it is 0."""
    return wanted or max(1, AUTOMATIC_MICRO_BATCH_TOKENS // config.context_length)
