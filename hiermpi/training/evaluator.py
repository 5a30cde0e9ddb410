"""Evaluation on the hierarchy: the windows dealt out evenly to the leaves."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.communicators import Communicators
from hiermpi.communication.reduction import allreduce_small
from hiermpi.communication.scatter import BatchScatter
from hiermpi.hierarchy.routing import even_leaves
from hiermpi.model.contract import Model
from hiermpi.training.batches import EvaluationSource, rows_to_batch
from hiermpi.training.evaluation import Evaluation


class Evaluator:
    """Evaluates a model, the windows dealt out evenly to the leaves.

    Args:
        model: on every rank, with equal parameters.
        comms: the hierarchy.
        scatter: delivers rows.
        source: at the root the windows; None elsewhere.
        batch_size: windows per exchange.
        stop_requested: asked after each exchange; when any rank says yes, all give up.
    """

    def __init__(
        self,
        model: Model,
        comms: Communicators,
        scatter: BatchScatter,
        source: EvaluationSource | None,
        batch_size: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.comms = comms
        self.scatter = scatter
        self.source = source
        self.batch_size = batch_size
        self.stop_requested = stop_requested
        windows = np.array([0 if source is None else len(source)], np.float64)
        allreduce_small(comms, windows)
        self.n_windows = int(windows[0])

    def evaluate(self) -> Evaluation | None:
        """The mean loss, on every rank; None if a rank wants to stop. Collective over the hierarchy."""
        total = np.zeros(2)
        for first in range(0, self.n_windows, self.batch_size):
            last = min(first + self.batch_size, self.n_windows)
            rows, leaf = None, None
            if self.source is not None:
                rows, leaf = self.source.rows(first, last), even_leaves(last - first, self.comms.topology)
            sums = self._loss(self.scatter.scatter(rows, leaf))
            allreduce_small(self.comms, sums)
            if sums[2]:
                return None
            total += sums[:2]
        return Evaluation(float(total[0] / max(total[1], 1.0)), int(total[1]))

    def _loss(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        loss, tokens = self.model.loss(rows_to_batch(rows, 0, 0)) if len(rows) else (0.0, 0)
        return np.array([loss, tokens, float(self.stop_requested())])
