"""AdamW with clipping and schedule on an owner's part of the parameters: the state that an owner holds.

An update reads one slot of parameters and moments and writes another, which :meth:`Optimizer.commit` and
:meth:`hiermpi.model.parameters.ParameterBuffer.flip` then put in its place. Until then it can be done again, or left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import OptimizerConfig
from hiermpi.hierarchy.lattice import Lattice
from hiermpi.hierarchy.ownership import Ownership
from hiermpi.kernels import Kernels
from hiermpi.model.parameters import ParameterBuffer
from hiermpi.optimizer.adamw import Moments, adamw_update
from hiermpi.optimizer.norm import block_sums, clip_scale, total_norm
from hiermpi.optimizer.schedule import warmup_cosine


@dataclass(frozen=True)
class OptimizerSettings:
    """What an update needs to know besides the arrays."""

    config: OptimizerConfig
    grad_clip: float
    steps: int
    """Steps of the whole run: the end of the decay where ``decay_steps`` is 0."""

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        return warmup_cosine(
            step,
            learning_rate=self.config.learning_rate,
            min_learning_rate=self.config.min_learning_rate,
            warmup_steps=self.config.warmup_steps,
            decay_steps=self.config.decay_steps or self.steps,
        )


class Optimizer:
    """Owns the moments of a part of ``parameters`` and applies updates to that part.

    Args:
        parameters: updated, in place where they have one slot.
        settings: see :class:`OptimizerSettings`.
        moments: zeroed slots for the moments of the whole vector, as many as the parameters have; of them only the
            parts that are owned are written.
        ownership: of the vector.
        owner: whose part this is, by number; the root has an optimizer even where it owns nothing.
        class_bounds: (S + 1,) row offsets of the symmetry classes, for the lattice.
        kernels: by default the environment's.
        coupling: of the token table's rows to their neighbours in the lattice.
    """

    def __init__(
        self,
        parameters: ParameterBuffer,
        settings: OptimizerSettings,
        moments: Sequence[Moments],
        ownership: Ownership,
        owner: int = 0,
        class_bounds: NDArray[np.int64] | None = None,
        kernels: Kernels | None = None,
        coupling: float = 0.0,
    ) -> None:
        self.kernels = kernels
        self.parameters = parameters
        self.settings = settings
        self.spans = ownership.spans_of(owner)
        self.moments = moments[0]
        self._next = moments[-1]
        self.count = 0
        """Updates applied so far, Adam's t."""
        self.coupling = coupling
        self.elements = sum(stop - start for start, stop, _ in self.spans)
        """Elements of the vector that are owned."""
        self._lattice = Lattice(class_bounds) if coupling and class_bounds is not None else None
        self._table = next((spec for spec in parameters.specs if spec.symmetry_rows), None)
        self._own = ownership.blocks_of(owner)
        self._bounds = np.stack([ownership.bounds[self._own], ownership.bounds[self._own + 1]], axis=1)
        self._classes = {int(index) for index in ownership.classes[self._own] if index >= 0}
        self.rows = 0 if class_bounds is None else sum(int(np.diff(class_bounds)[index]) for index in self._classes)
        """Rows of the token table that are owned."""
        self._first_of_class = {index: int(np.argmax(ownership.classes == index)) for index in self._classes}
        self._findings = np.zeros((2 if self._lattice else 1, len(ownership.owners)))
        self._sums = np.zeros(len(self._own))
        self._decay_ranges = [
            (max(start, span.start), min(stop, span.stop), decay)
            for span in self.spans
            for start, stop, decay in parameters.decay_ranges()
            if start < span.stop and span.start < stop
        ]

    def measure(self, gradients: NDArray[np.float32], n_tokens: int) -> NDArray[np.float64]:
        """What the owners must tell each other of their blocks, zero in the others': (1 or 2, blocks).

        Row 0 is the sum of squares of the gradient sums; row 1, where rows are coupled, the lattice's loss, at the
        first block of a class. Adds the lattice's gradient first: ``n_tokens`` of it, as sums are divided later.
        """
        findings = self._findings
        findings[:] = 0.0
        if self._lattice is not None and self._table is not None and n_tokens:
            out, table = (self.parameters.view(vector, self._table) for vector in (gradients, self.parameters.vector))
            losses = self._lattice.add_gradient(out, table, self.coupling * n_tokens, self._classes)
            for index, block in self._first_of_class.items():
                findings[1, block] = losses[index] / n_tokens
        if self.spans:
            block_sums(gradients, self._bounds, self._sums, self.kernels)
            findings[0, self._own] = self._sums
        return findings

    def update(self, gradients: NDArray[np.float32], n_tokens: int, norm: float, step: int) -> None:
        """Divide the gradient sums once by the tokens, clip, and apply AdamW to the owned part, into the next slots.

        Args:
            gradients: sums over all tokens of the step.
            n_tokens: number of those tokens.
            norm: of the mean gradient, finite.
            step: steps finished before this one.
        """
        if not isfinite(norm):
            raise ValueError(f"gradient norm is {norm}: such a step must be skipped")
        if not self.spans:  # a root that only coordinates
            return
        adamw_update(
            self.parameters.vector,
            gradients,
            *self.moments,
            count=self.count + 1,
            learning_rate=self.settings.learning_rate(step),
            beta1=self.settings.config.beta1,
            beta2=self.settings.config.beta2,
            weight_decay=self.settings.config.weight_decay,
            decay_ranges=self._decay_ranges,
            scale=clip_scale(norm, self.settings.grad_clip) / n_tokens,
            out_parameters=self.parameters.next,
            out_m=self._next.m,
            out_v=self._next.v,
            kernels=self.kernels,
        )

    def commit(self) -> None:
        """Count the update, and make the moments that it wrote the moments."""
        self.count += 1
        self.moments, self._next = self._next, self.moments


def norm_and_lattice_loss(findings: NDArray[np.float64], n_tokens: int) -> tuple[float, float]:
    """L2 norm of the mean gradient (not finite where any element is not), and the lattice's loss.

    Args:
        findings: of all owners, see :meth:`Optimizer.measure`.
        n_tokens: of the step.
    """
    norm = total_norm(findings[0]) / n_tokens if n_tokens else float("nan")
    return norm, fsum(findings[1]) if len(findings) > 1 else 0.0
