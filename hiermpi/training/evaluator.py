"""Evaluation on the hierarchy: the windows dealt out evenly to the leaves."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.compute_slots import Turns
from hiermpi.communication.scatter import Scatter
from hiermpi.hierarchy.routing import even_leaves
from hiermpi.model.contract import Model
from hiermpi.training.batches import EvaluationSource
from hiermpi.training.evaluation import EVALUATION_UNIT, Evaluation, loss_in_units


class Evaluator:
    """Evaluates a model, the windows dealt out evenly to the leaves.

    Args:
        model: on every rank, with equal parameters.
        comms: the hierarchy.
        scatter: delivers rows.
        sum_everywhere: of a few numbers, over all ranks (:meth:`Reduction.sum_everywhere`).
        source: at the root the windows; None elsewhere.
        batch_size: windows per exchange, rounded up to whole units for each leaf.
        turns: taken to compute.
        stop_requested: asked after each exchange; when any rank says yes, all give up.
    """

    def __init__(
        self,
        model: Model,
        comms: Communicators,
        scatter: Scatter,
        sum_everywhere: Callable[[NDArray[np.float64]], None],
        source: EvaluationSource | None,
        batch_size: int,
        turns: Turns,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.turns = turns
        self.model = model
        self.comms = comms
        self.scatter = scatter
        self.sum_everywhere = sum_everywhere
        self.source = source
        per_leaf = -(-batch_size // (comms.topology.n_leaves * EVALUATION_UNIT))
        self.batch_size = per_leaf * comms.topology.n_leaves * EVALUATION_UNIT
        self.stop_requested = stop_requested
        windows = np.array([0 if source is None else len(source)], np.float64)
        sum_everywhere(windows)
        self.n_windows = int(windows[0])

    def evaluate(self) -> Evaluation | None:
        """The mean loss, on every rank; None if a rank wants to stop. Collective over the hierarchy."""
        total = np.zeros(2)
        for first in range(0, self.n_windows, self.batch_size):
            last = min(first + self.batch_size, self.n_windows)
            rows, leaf = None, None
            if self.source is not None:
                rows = self.source.rows(first, last)
                units = -(-len(rows) // EVALUATION_UNIT)
                leaf = np.repeat(even_leaves(units, self.comms.topology), EVALUATION_UNIT)[: len(rows)]
            sums = self._loss(self.scatter.scatter(rows, leaf))
            self.sum_everywhere(sums)
            if sums[2]:
                return None
            total += sums[:2]
        return Evaluation(float(total[0] / max(total[1], 1.0)), int(total[1]))

    def _loss(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        loss, tokens = 0.0, 0
        if len(rows):
            with self.turns:
                loss, tokens = loss_in_units(self.model, rows)
        return np.array([loss, tokens, float(self.stop_requested())])
