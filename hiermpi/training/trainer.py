"""One training step on the hierarchy, and the loop around it.

A step reads as the method does: batch, scatter, compute, reduce, optimize, broadcast, commit. It is a transaction:
before the commit only scratch has changed, and the parameters and moments only after every leaf has reported finite
gradients. Where these have two slots (:mod:`hiermpi.optimizer.slots`) not even they have: a step that some rank did not
live to commit can be done again. Ranks are then never more than one commit apart, as nobody gives gradients to a step
before it has committed the one before, and the slot of that one stays until the sum of the next has come.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.compute_slots import Turns
from hiermpi.communication.reduction import Reduction
from hiermpi.communication.scatter import Scatter
from hiermpi.config.schema import Config
from hiermpi.data.rows import ID_COLUMNS, unpack_rows
from hiermpi.errors import UserError
from hiermpi.model.contract import Model, WritingModel
from hiermpi.optimizer.sums import add_fixed, from_fixed, largest_addend, rounded_loss, unit_sequences
from hiermpi.optimizer.update import Optimizer, norm_and_lattice_loss
from hiermpi.signals import StopRequests
from hiermpi.training.batches import BatchSource, PreparedBatch, rows_to_batch
from hiermpi.training.phases import Phases

MOST_SKIPPED_IN_A_ROW = 10

logger = logging.getLogger("hiermpi")


@dataclass
class Progress:
    """Where the run stands: that of the last committed step."""

    step: int = 0
    """Steps finished, skipped ones included."""
    cursor: int = 0
    """Sequences drawn by them."""
    skipped: int = 0
    """Steps that were skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0


class Verdict(NamedTuple):
    """What was decided on a step, known to every rank. All are float64, so that it travels as one vector."""

    applied: float
    stop: float
    save: float
    loss: float
    grad_norm: float
    lattice_loss: float
    tokens: float
    bad_leaves: float


UNDECIDED = Verdict(*[0.0] * len(Verdict._fields))


class StepResult(NamedTuple):
    """A committed step, as every rank knows it."""

    step: int
    loss: float
    grad_norm: float
    lattice_loss: float
    tokens: int
    learning_rate: float
    seconds: float
    applied: bool
    stop: bool
    save: bool


class Trainer:
    """Runs steps. Every rank has one and calls the same methods; what a rank does follows from its data.

    Args:
        config: resolved, the same on every rank.
        comms: the hierarchy.
        model: on every rank, with equal parameters.
        reduction: how sums go up and parameters down; of int64 where ``hierarchy.reproducible``.
        scatter: how rows go down.
        phases: where time is accounted.
        stopping: this rank's requests to stop.
        turns: taken to compute.
        progress: where the run stands, the same on every rank.
        learning_rate: of a step, by the number of steps finished before it.
        source: the batches (root only).
        optimizer: (root and owners only).
    """

    def __init__(
        self,
        config: Config,
        comms: Communicators,
        model: Model,
        reduction: Reduction,
        scatter: Scatter,
        phases: Phases,
        stopping: StopRequests,
        turns: Turns,
        progress: Progress,
        learning_rate: Callable[[int], float],
        source: BatchSource | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.config = config
        self.comms = comms
        self.model = model
        self.reduction = reduction
        self.scatter = scatter
        self.phases = phases
        self.stopping = stopping
        self.turns = turns
        self.progress = progress
        self.learning_rate = learning_rate
        self.source = source
        self.optimizer = optimizer
        self.save_due: Callable[[int], bool] = lambda _: False
        """Whether to save after a step (asked at the root only, before it)."""
        self.sums = reduction.gradient_vector()
        """What is summed over the ranks: the gradients themselves, or their fixed-point form."""
        self.reproducible = config.hierarchy.reproducible
        self.gradients = model.parameters.new_vector() if self.reproducible else self.sums
        """Of all this leaf's sequences, or of the unit in work."""
        self._only_coordinates = reduction.keeps_gradients and not comms.topology.is_leaf(comms.rank)
        """Whether this rank never computes, and the sum passes its gradients by."""
        self.unit = unit_sequences(config)
        self._largest = largest_addend(-(-config.train.batch_size // self.unit))
        self.sequences = 0
        """Sequences that this rank has computed."""
        self.tokens = 0
        """Target tokens that this rank has computed."""
        self._complaint = ""

    def step(self) -> StepResult:
        """Do one step. Collective over the hierarchy.

        Raises:
            UserError: on every rank, after too many skipped steps in a row.
        """
        start = time.perf_counter()
        phases, progress = self.phases, self.progress
        phases.step = progress.step + 1
        with phases("batch"):
            batch = self.source.take(progress.cursor) if self.source else None
        with phases("scatter"):
            rows = self.scatter.scatter(*((batch.rows, batch.routing.leaf) if batch else (None, None)))
        with phases("batch"):
            if self.source and batch:
                self.source.prepare(batch.next_cursor)
        with phases("compute"):
            sums = self._compute(rows)
        with phases("reduce"):
            total = self.reduction.reduce(sums, self.sums)
        with phases("optimize"):
            verdict = self._optimize(sums, total)
        with phases("broadcast"):
            verdict = self._broadcast(verdict)
        with phases("commit"):
            self._commit(verdict, rows, batch)
        return StepResult(
            progress.step,
            verdict.loss,
            verdict.grad_norm,
            verdict.lattice_loss,
            int(verdict.tokens),
            self.learning_rate(progress.step - 1),
            time.perf_counter() - start,
            bool(verdict.applied),
            bool(verdict.stop),
            bool(verdict.save),
        )

    def _compute(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Put this leaf's gradient sums into :attr:`gradients`; return its part of the step's small sums."""
        if self._only_coordinates:
            return self._small_sums(0.0, 0, False)
        if self.reproducible:
            return self._compute_units(rows)
        loss, tokens = self._write_gradients(rows)
        # What the sum overwrites is looked at now; else a norm that is not finite will tell, and then who it was.
        bad = not isfinite(loss) or not (self.reduction.keeps_gradients or all_finite(self.gradients))
        self._complaint = self._describe_bad(rows) if bad else ""
        return self._small_sums(loss, tokens, bad)

    def _small_sums(self, loss: float, tokens: int, bad: bool) -> NDArray[np.float64]:
        """[loss_sum, n_tokens, bad leaves, requests to stop, requests to save]."""
        save = self.comms.rank == 0 and self.save_due(self.progress.step + 1)
        return np.array([loss, tokens, bad, self.stopping.requested(), save], np.float64)

    def _compute_units(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """The same unit by unit, each as it would be on any other rank, into the fixed-point :attr:`sums`.

        Rows come in the order of the batch and units are routed whole, so every unit but the batch's last is full.
        """
        loss, tokens, self._complaint = 0.0, 0, ""
        for first in range(0, max(len(rows), 1), self.unit):
            part = rows[first : first + self.unit]
            unit_loss, unit_tokens = self._write_gradients(part)
            fits = add_fixed(self.sums, self.gradients, self._largest, fresh=first == 0)
            if not (fits and isfinite(unit_loss)) and not self._complaint:
                self._complaint = self._describe_bad(part)
            loss, tokens = loss + rounded_loss(unit_loss), tokens + unit_tokens
        return self._small_sums(loss, tokens, bool(self._complaint))

    def _write_gradients(self, rows: NDArray[np.int32]) -> tuple[float, int]:
        """The gradient of these sequences, if any, in place of what :attr:`gradients` held."""
        batch = rows_to_batch(rows, self.config.train.seed, self.progress.step)
        result = 0.0, 0
        if len(rows) and isinstance(self.model, WritingModel):
            with self.turns:
                result = self.model.write_gradients(batch, self.gradients)
        else:
            self.gradients[:] = 0
            if len(rows):
                with self.turns:
                    result = self.model.loss_and_gradients(batch, self.gradients)
        fault = self.phases.planted_nan()
        if fault is not None:
            spec = self.model.parameters.specs[fault.tensor]
            self.gradients[self.model.parameters.offsets[spec.name]] = np.nan
        return result

    def _optimize(self, sums: NDArray[np.float64], total: NDArray) -> Verdict:
        """Decide on the step and, unless it must be skipped, update the owned parameters.

        All that decide come to the same verdict; other ranks hear it later. Collective over the hierarchy.
        """
        optimizer = self.optimizer if self.reduction.decides else None
        findings, tokens = None, int(sums[1])
        if optimizer is not None:
            if self.reproducible:
                for start, stop, _ in optimizer.spans:
                    from_fixed(self.gradients[start:stop], total[start:stop])
                total = self.gradients
            findings = optimizer.measure(total, tokens)
        if self.reduction.ownership.shared_out:
            self.reduction.exchange(findings)
        if optimizer is None or findings is None:
            return UNDECIDED
        loss_sum, _, bad, stop_requests, save_requests = (float(value) for value in sums)
        norm, lattice_loss = norm_and_lattice_loss(findings, tokens)
        applied = not bad and isfinite(norm) and isfinite(loss_sum)
        if applied:
            optimizer.update(total, tokens, norm, self.progress.step)
        loss = loss_sum / tokens if tokens else float("nan")
        return Verdict(applied, stop_requests > 0, save_requests > 0, loss, norm, lattice_loss, tokens, bad)

    def _broadcast(self, verdict: Verdict) -> Verdict:
        vector = np.array(verdict, np.float64)
        self.reduction.broadcast(vector, self.model.parameters.next)
        return Verdict(*(float(value) for value in vector))

    def _commit(self, verdict: Verdict, rows: NDArray[np.int32], batch: PreparedBatch | None) -> None:
        progress = self.progress
        progress.step += 1
        progress.cursor += self.config.train.batch_size
        self.sequences += len(rows)
        self.tokens += int((rows[:, ID_COLUMNS + 1 :] >= 0).sum())
        if self.source and batch:
            self.source.router.record(batch.routing)
        if verdict.applied:
            self.model.parameters.flip()
            if self.optimizer is not None:
                self.optimizer.commit()
            progress.skipped_in_a_row = 0
            return
        unseen = self.reduction.keeps_gradients and not self.reproducible and not self._complaint
        if unseen and not all_finite(self.gradients):
            self._complaint = self._describe_bad(rows)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._report_skip(verdict)
        if progress.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            error = UserError(
                f"{MOST_SKIPPED_IN_A_ROW} steps in a row up to step {progress.step} gave a loss or gradient that is "
                "not finite: lower optimizer.learning_rate, or go back to an earlier checkpoint with --resume PATH"
            )
            error.everywhere = True
            raise error

    def _describe_bad(self, rows: NDArray[np.int32]) -> str:
        tensors = self.model.parameters.views(self.gradients)
        names = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        if not names and self.reproducible:
            large = np.float32(self._largest)
            names = [f"{name} (too large for a sum)" for name, t in tensors.items() if (np.abs(t) >= large).any()]
        names = names or ["the loss"]
        ids, _ = unpack_rows(rows)
        return f"{_shorten(names)} in sequences {_shorten([str(i) for i in ids])}"

    def _report_skip(self, verdict: Verdict) -> None:
        """Name the leaves, tensors and sequences behind a skipped step. Collective over the world."""
        complaints = gather_objects(self.comms.world, self._complaint, self.comms.waiter)
        if complaints is None:
            return
        told = [f"rank {rank}: {text}" for rank, text in enumerate(complaints) if text]
        reason = _shorten(told, "; ") if told else f"the gradient norm of the whole batch is {verdict.grad_norm}"
        logger.warning("step %d skipped, not finite: %s", self.progress.step, reason)


def _shorten(names: list[str], separator: str = ", ", most: int = 4) -> str:
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def all_finite(vector: NDArray[np.float32]) -> bool:
    """Whether no element of ``vector`` is NaN or infinite."""
    # One cheap pass: a sum is finite unless an element is not, or the sum overflows; only then look closely.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(vector.sum())) or bool(np.isfinite(vector).all())
