"""AdamW with clipping and schedule on one parameter buffer: the state that the owner of the parameters holds."""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import OptimizerConfig
from hiermpi.hierarchy.lattice import Lattice
from hiermpi.model.kernels import Kernels
from hiermpi.model.parameters import ParameterBuffer
from hiermpi.optimizer.adamw import adamw_update
from hiermpi.optimizer.norm import block_sums, clip_scale, norm_blocks, total_norm
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
    """Owns the moments of ``parameters`` and applies updates to them.

    Args:
        parameters: updated in place.
        settings: see :class:`OptimizerSettings`.
        class_bounds: row offsets of the symmetry classes; the norm's blocks never cross them.
        kernels: by default the environment's.
        coupling: of the token table's rows to their neighbours in the lattice; needs ``class_bounds``.
    """

    def __init__(
        self,
        parameters: ParameterBuffer,
        settings: OptimizerSettings,
        class_bounds: NDArray[np.int64] | None = None,
        kernels: Kernels | None = None,
        coupling: float = 0.0,
    ) -> None:
        self.kernels = kernels
        self.parameters = parameters
        self.settings = settings
        self.m = parameters.new_vector()
        self.v = parameters.new_vector()
        self.count = 0
        """Updates applied so far, Adam's t."""
        self.coupling = coupling
        self.lattice_loss = 0.0
        """Of the last :meth:`couple`; not part of the loss."""
        self._lattice = Lattice(class_bounds) if coupling and class_bounds is not None else None
        self._table = next((spec.name for spec in parameters.specs if spec.symmetry_rows), None)
        self._blocks = norm_blocks(parameters, class_bounds)
        self._sums = np.zeros(len(self._blocks))
        self._decay_ranges = tuple(parameters.decay_ranges())

    def couple(self, gradients: NDArray[np.float32], n_tokens: int) -> None:
        """Add the lattice's gradient to the gradient sums: ``n_tokens`` of it, as they are divided by that later."""
        if self._lattice is None or self._table is None:
            return
        out, table = self.parameters.views(gradients)[self._table], self.parameters[self._table]
        self.lattice_loss = self._lattice.add_gradient(out, table, self.coupling * n_tokens) / n_tokens

    def gradient_norm(self, gradients: NDArray[np.float32], n_tokens: int) -> float:
        """L2 norm of the mean gradient, from gradient sums; not finite where any element is not."""
        block_sums(gradients, self._blocks, self._sums, self.kernels)
        return total_norm(self._sums) / n_tokens

    def update(self, gradients: NDArray[np.float32], n_tokens: int, norm: float, step: int) -> None:
        """Divide the gradient sums once by the tokens, clip, and apply AdamW.

        Args:
            gradients: sums over all tokens of the step.
            n_tokens: number of those tokens.
            norm: from :meth:`gradient_norm`, finite.
            step: steps finished before this one.
        """
        if not isfinite(norm):
            raise ValueError(f"gradient norm is {norm}: such a step must be skipped")
        self.count += 1
        vector = self.parameters.vector
        adamw_update(
            vector,
            gradients,
            self.m,
            self.v,
            count=self.count,
            learning_rate=self.settings.learning_rate(step),
            beta1=self.settings.config.beta1,
            beta2=self.settings.config.beta2,
            weight_decay=self.settings.config.weight_decay,
            decay_ranges=self._decay_ranges,
            scale=clip_scale(norm, self.settings.grad_clip) / n_tokens,
            out_parameters=vector,
            out_m=self.m,
            out_v=self.v,
            kernels=self.kernels,
        )
