"""This module applies one update to an owner's part of the parameters: norm, clipping and rule.

The gradient norm does not depend on which rank holds which part of the vector: it is made of float64 sums of squares
over fixed blocks of the vector, added in the order of the blocks. Blocks never cross a tensor, nor a symmetry class of
a token table, so the owner of a class or tensor always holds whole blocks.

An update reads one slot of parameters and state and writes another, which :meth:`Optimizer.commit` and
:meth:`hiermpi.model.parameters.ParameterBuffer.flip` then put into use. Until then it can be repeated or dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, isfinite, sqrt
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config, OptimizerConfig, WatchedTable
from hiermpi.errors import PluginError, plugin_errors
from hiermpi.hierarchy.ownership import FREE, Ownership, assign
from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels import Kernels, load_kernels
from hiermpi.kernels.memory import read_only
from hiermpi.model.parameters import Lattice, ParameterBuffer, ParameterLayout
from hiermpi.optimizer.rules import Hyper, Rule, Schedule, Values, needs_whole, rule_of

LARGEST_BLOCK = 4096
"""The most elements of a block of the norm: small enough that owners' shares, which are whole blocks, are even."""


def norm_blocks(
    layout: ParameterLayout, class_bounds: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (n + 1,) bounds of the blocks, which cover the vector with its padding, and their (n,) classes.

    The symmetry class of a block is -1 where it does not belong to a token table.

    Args:
        layout: The layout of the vector.
        class_bounds: (S + 1,) The rows at which the symmetry classes begin, and V.
    """
    starts: list[int] = []
    classes: list[int] = []
    for spec in layout.specs:
        offset, row = layout.offsets[spec.name], spec.size // spec.shape[0]
        parts, of_class = [0, spec.size], [-1]
        if spec.symmetry_rows and class_bounds is not None:
            parts, of_class = [int(bound) * row for bound in class_bounds], list(range(len(class_bounds) - 1))
        for (first, last), symmetry_class in zip(pairwise(parts), of_class, strict=True):
            begun = range(first, last, LARGEST_BLOCK)
            starts += [offset + start for start in begun]
            classes += [symmetry_class] * len(begun)
    return np.array([*starts, layout.size], np.int64), np.array(classes, np.int64)


def ownership_of(
    config: Config, topology: Topology, layout: ParameterLayout, class_bounds: NDArray[np.int64], rule: Rule
) -> Ownership:
    """Assign the blocks of the vector to owners, by ``optimizer.placement`` and the needs of the rule.

    Args:
        config: The resolved configuration.
        topology: The topology of the ranks.
        layout: The layout of the vector.
        class_bounds: (S + 1,) The rows at which the symmetry classes begin, and V.
        rule: The rule of the run.
    """
    bounds, classes = norm_blocks(layout, class_bounds)
    whole = [needs_whole(rule_of(rule, spec), spec) for spec in layout.specs]
    together = None
    if any(whole):
        of_block = np.searchsorted([layout.offsets[spec.name] for spec in layout.specs], bounds[:-1], side="right") - 1
        together = np.where(np.array(whole)[of_block], of_block, FREE)
    return assign(bounds, classes, topology, config.optimizer.placement, together)


def total_norm(sums: NDArray[np.float64]) -> float:
    """Return the norm for the blocks' (n,) sums of squares; it is NaN where any of them is not finite."""
    if not np.isfinite(sums).all():
        return float("nan")
    return sqrt(fsum(sums))


def clip_scale(norm: float, limit: float) -> float:
    """Return the factor that brings a gradient of this norm to at most ``limit``; with a limit of 0 it is 1."""
    return limit / norm if limit and norm > limit else 1.0


def slots_of(config: Config) -> int:
    """Return how many slots parameters and state have.

    There are two where the other ranks go on after the death of a rank, which must not leave half-updated parameters
    behind; else there is one.
    """
    return 2 if config.run.on_failure == "shrink" else 1


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of an update."""

    config: OptimizerConfig
    grad_clip: float
    steps: int
    """The number of steps of the whole run: the end of the decay where ``decay_steps`` is 0."""
    schedule: Schedule

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones."""
        return self.schedule(
            step,
            learning_rate=self.config.learning_rate,
            min_learning_rate=self.config.min_learning_rate,
            warmup_steps=self.config.warmup_steps,
            decay_steps=self.config.decay_steps or self.steps,
        )


class WatchedHyper(Hyper):
    """The numbers of one update, which note in ``seen`` what a rule from outside reads of them."""

    seen: set[str]

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in Hyper._fields:
            self.seen.add(name)
            return MappingProxyType(WatchedTable(dict(value), self.seen)) if name == "options" else value
        return value

    def __iter__(self) -> Iterator[Any]:
        self.seen.update(self._fields, (f"options.{name}" for name in super().__getattribute__("options")))
        return super().__iter__()


class Piece(NamedTuple):
    """A part of the vector that a rule updates at once: a run of elements that it treats alike, or a whole tensor."""

    start: int
    stop: int
    rule: Rule
    decay: bool
    shape: tuple[int, ...] | None


def pieces_of(layout: ParameterLayout, rule: Rule, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """Return an owner's spans of the vector cut into pieces, as few as its rules allow.

    Args:
        layout: The layout of the vector.
        rule: The rule of the run.
        spans: The bounds (start, stop) of what is owned, in order.
    """
    pieces: list[Piece] = []
    bounds = [layout.offsets[spec.name] for spec in layout.specs] + [layout.size]
    of_spec = [(rule_of(rule, spec), needs_whole(rule_of(rule, spec), spec)) for spec in layout.specs]
    for start, stop in spans:
        for index, spec in enumerate(layout.specs):
            first, last = max(start, bounds[index]), min(stop, bounds[index + 1])
            if first >= last:
                continue
            chosen, whole = of_spec[index]
            before = pieces[-1] if pieces else None
            if whole:  # without the padding behind it
                pieces.append(Piece(first, first + spec.size, chosen, spec.decay, spec.shape))
            elif before and before[1:] == (first, chosen, spec.decay, None):
                pieces[-1] = before._replace(stop=last)
            else:
                pieces.append(Piece(first, last, chosen, spec.decay, None))
    return pieces


class Optimizer:
    """The optimizer of one owner: it keeps the state of a part of ``parameters`` and applies updates to that part.

    Args:
        parameters: The parameters to update, in place where they have one slot.
        settings: The settings of the updates.
        state_slots: The zeroed slots of the rule's state, as many as the parameters have, each with a vector of the
            whole length for each name; only the parts that are owned are written.
        ownership: The owners of the vector.
        owner: The number of the owner; the root has an optimizer even where it owns nothing.
        rule: The rule of the run.
        class_bounds: (S + 1,) The rows at which the symmetry classes begin, and V; the lattice needs them.
        kernels: The kernels that compute; by default those of the environment.
        coupling: The strength of the coupling of the token table's rows to their neighbours in the lattice.
        name: The text by which messages name a rule from outside the package; else empty.
    """

    def __init__(
        self,
        parameters: ParameterBuffer,
        settings: OptimizerSettings,
        state_slots: Sequence[Mapping[str, NDArray[np.float32]]],
        ownership: Ownership,
        owner: int,
        rule: Rule,
        class_bounds: NDArray[np.int64] | None = None,
        kernels: Kernels | None = None,
        coupling: float = 0.0,
        name: str = "",
    ) -> None:
        self.kernels = kernels or load_kernels()
        self.parameters = parameters
        self.settings = settings
        self.name = name
        self.spans = ownership.spans_of(owner)
        self.updates = 0
        """Updates applied so far."""
        self.seen: set[str] = set()
        """The settings that a rule from outside has read."""
        self.coupling = coupling
        self.elements = sum(stop - start for start, stop, _ in self.spans)
        """The number of elements of the vector that are owned."""
        self._states = list(state_slots)
        self._slot = 0
        spans = [(start, stop) for start, stop, _ in self.spans]
        self._pieces = [self._with_kernels(piece) for piece in pieces_of(parameters, rule, spans)]
        self._values = [
            [values_of(piece, vector, state) for piece in self._pieces]
            for vector, state in zip(parameters.slots, self._states, strict=True)
        ]
        self._lattice = Lattice(class_bounds) if coupling and class_bounds is not None else None
        self._table = next((spec for spec in parameters.specs if spec.symmetry_rows), None)
        self._own = ownership.blocks_of(owner)
        self._bounds = np.stack([ownership.bounds[self._own], ownership.bounds[self._own + 1]], axis=1)
        self._classes = {int(index) for index in ownership.classes[self._own] if index >= 0}
        self.rows = 0 if class_bounds is None else sum(int(np.diff(class_bounds)[index]) for index in self._classes)
        """The number of rows of the token table that are owned."""
        self._first_of_class = {index: int(np.argmax(ownership.classes == index)) for index in self._classes}
        self._findings = np.zeros((2 if self._lattice else 1, len(ownership.owners)))
        self._sums = np.zeros(len(self._own))

    @property
    def state(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the vectors of the state in use by name; each has the whole length."""
        return self._states[self._slot]

    def _with_kernels(self, piece: Piece) -> Piece:
        """Return the piece with a rule that uses this optimizer's kernels, where the rule uses kernels at all."""
        bind = getattr(piece.rule, "with_kernels", None)
        return piece._replace(rule=bind(self.kernels)) if bind else piece

    def couple(self, gradients: NDArray[np.float32], n_tokens: int) -> NDArray[np.float64] | None:
        """Add ``n_tokens`` times the lattice's gradient of the owned rows, as the sums are divided by it later.

        It returns the (S,) shares of the owned classes in the lattice's loss; None where rows are not coupled.
        """
        if self._lattice is None or self._table is None or not n_tokens:
            return None
        out, table = (self.parameters.view(vector, self._table) for vector in (gradients, self.parameters.vector))
        return self._lattice.add_gradient(out, table, self.coupling * n_tokens, self._classes) / n_tokens

    def findings(
        self, gradients: NDArray[np.float32], lattice_losses: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """Return the (1 or 2, blocks) numbers that owners exchange; they are zero for blocks of other owners.

        Row 0 has the sum of squares of each block's gradient sums. Row 1, which is there where rows are coupled, has
        the lattice's loss of each class at the first block of the class.
        """
        findings = self._findings
        findings[:] = 0.0
        if lattice_losses is not None:
            for index, block in self._first_of_class.items():
                findings[1, block] = lattice_losses[index]
        if self.spans:
            self.kernels.block_sums(self._sums, gradients, self._bounds)
            findings[0, self._own] = self._sums
        return findings

    def update(self, gradients: NDArray[np.float32], n_tokens: int, norm: float, step: int) -> None:
        """Apply the rule to the owned part and write the result to the next slots.

        The gradient sums are divided by the tokens and clipped in the same pass.

        Args:
            gradients: The sums over all tokens of the step.
            n_tokens: The number of those tokens.
            norm: The norm of the mean gradient.
            step: The number of steps finished before this one.

        Raises:
            ValueError: The norm is not finite.
            PluginError: A rule from outside raised an exception, or made parameters that are not finite.
        """
        if not isfinite(norm):
            raise ValueError(f"gradient norm is {norm}: such a step must be skipped")
        config = self.settings.config
        hyper = Hyper(
            self.updates + 1,
            self.settings.learning_rate(step),
            clip_scale(norm, self.settings.grad_clip) / n_tokens,
            config.weight_decay,
            config.beta1,
            config.beta2,
            config.options,
            None,
        )
        still = hyper._replace(weight_decay=0.0)
        following = len(self._values) - 1 - self._slot
        for piece, old, new in zip(self._pieces, self._values[self._slot], self._values[following], strict=True):
            numbers = hyper if piece.decay else still
            if piece.shape is not None:
                numbers = numbers._replace(shape=piece.shape)
            part = gradients[piece.start : piece.stop]
            if self.name:
                self._from_outside(piece, new, old, part, numbers)
            else:
                piece.rule.update(new, old, part, numbers)

    def _from_outside(
        self, piece: Piece, new: Values, old: Values, gradients: NDArray[np.float32], numbers: Hyper
    ) -> None:
        """Apply a rule from outside; what it raises or breaks is told in one sentence that names it."""
        before = Values(read_only(old.parameters), {key: read_only(vector) for key, vector in old.state.items()})
        numbers = WatchedHyper(*numbers)
        numbers.seen = self.seen
        with plugin_errors(self.name):
            returned: object = piece.rule.update(  # type: ignore[func-returns-value]
                new, before, read_only(gradients), numbers
            )
        if returned is not None:
            kind = type(returned).__name__
            raise PluginError(f"{self.name}: update returned {kind}: it must write into `new`, and return None")
        for what, vector in {"parameters": new.parameters, **new.state}.items():
            if not np.isfinite(vector).all():
                raise PluginError(f"{self.name}: it made {what} that are not finite")

    def commit(self) -> None:
        """Count the update, and put the state that it wrote into use."""
        self.updates += 1
        self._slot = len(self._states) - 1 - self._slot


def values_of(piece: Piece, parameters: NDArray[np.float32], state: Mapping[str, NDArray[np.float32]]) -> Values:
    """Return the views of a piece into vectors of the whole length.

    Args:
        piece: The piece.
        parameters: The vector of the parameters.
        state: The vectors of the state by name; those that the piece's rule names are taken.
    """
    part = slice(piece.start, piece.stop)
    return Values(parameters[part], {name: state[name][part] for name in piece.rule.state})


def norm_and_lattice_loss(findings: NDArray[np.float64], n_tokens: int) -> tuple[float, float]:
    """Return the L2 norm of the mean gradient (NaN where any element is not finite), and the lattice's loss.

    Args:
        findings: The numbers of all owners, see :meth:`Optimizer.findings`.
        n_tokens: The number of tokens of the step; without any the norm is NaN.
    """
    norm = total_norm(findings[0]) / n_tokens if n_tokens else float("nan")
    return norm, fsum(findings[1]) if len(findings) > 1 else 0.0
