"""The trainer runs one training step on the hierarchy.

A step has the order of the method: batch, scatter, compute, reduce, optimize, broadcast, commit. It is a transaction:
before the commit only temporary memory changes, and the parameters and moments change only after every leaf has
reported finite gradients. Where these have two slots (:func:`hiermpi.optimizer.update.slots_of`), a step that some rank
did not live to commit can be done again, because its old values are unchanged. Ranks are then never more than one
commit apart: a rank gives gradients to a step only after it has committed the step before, whose slot stays until the
sum of the next has come.
"""

import logging
import time
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiermpi.communication.agreement import gather_objects
from hiermpi.data.sequences import unpack_records
from hiermpi.errors import UserError, plugin_errors
from hiermpi.kernels.loops import ID_COLUMNS
from hiermpi.model.contract import Batch, WritingModel, check_result
from hiermpi.optimizer.sums import all_finite, make_sums
from hiermpi.optimizer.update import norm_and_lattice_loss
from hiermpi.training.batches import BatchSource, PreparedBatch, records_to_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from hiermpi.training.assembly import Rank

MOST_SKIPPED_IN_A_ROW = 10

logger = logging.getLogger("hiermpi")


class Verdict(NamedTuple):
    """The decision on a step, which every rank receives. All fields are float64, so that it travels as one vector."""

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
    """The result of a committed step, as every rank knows it."""

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
    """A trainer that runs steps. Every rank has one and calls the same methods; its data decide what the rank does.

    Args:
        rank: The parts of this rank.
        source: The batches, at the root; None elsewhere.
    """

    def __init__(self, rank: "Rank", source: BatchSource | None = None) -> None:
        self.rank = rank
        self.config = rank.config
        self.comms = rank.comms
        self.model = rank.model
        self.reduction = rank.reduction
        self.phases = rank.phases
        self.progress = rank.progress
        self.source = source
        self.save_due: Callable[[int], bool] = lambda _: False
        """The function that decides whether to save after a step; only the root calls it, before the step."""
        self.sums = make_sums(rank.config, rank.reduction.gradient_vector(), rank.reduction.keeps_gradients)
        """The gradient sums over the ranks."""
        self.sequences = 0
        """The number of sequences that this rank has computed."""
        self.tokens = 0
        """The number of target tokens that this rank has computed."""
        self._writing = rank.model if isinstance(rank.model, WritingModel) else None
        self._coordinates_only = rank.reduction.keeps_gradients and not rank.comms.topology.is_leaf(rank.comms.rank)
        """This is true if this rank never computes, so that the sum skips its gradients."""
        self._complaint = ""

    def step(self) -> StepResult:
        """Do one step. Collective over the hierarchy.

        Raises:
            UserError: Too many steps in a row were skipped; every rank raises it.
        """
        start = time.perf_counter()
        phases, progress = self.phases, self.progress
        phases.step = progress.step + 1
        with phases("batch"):
            batch = self.source.take(progress.cursor) if self.source else None
        with phases("scatter"):
            rows = self.rank.scatter.scatter(*((batch.records, batch.dealt.leaf) if batch else (None, None)))
        with phases("batch"):
            if self.source and batch:
                self.source.prepare(batch.next_cursor)
        with phases("compute"):
            sums = self._compute(rows)
        with phases("reduce"):
            total = self.reduction.reduce(sums, self.sums.vector)
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
            self.rank.learning_rate(progress.step - 1),
            time.perf_counter() - start,
            bool(verdict.applied),
            bool(verdict.stop),
            bool(verdict.save),
        )

    def _compute(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Add this leaf's gradients into :attr:`sums`, and return its part of the step's small sums.

        Rows come in the order of the batch and units are routed whole, so every unit but the batch's last is full.
        """
        loss, tokens, self._complaint = 0.0, 0, ""
        if self._coordinates_only:
            return self._small_sums(loss, tokens)
        unit = self.sums.unit or max(len(rows), 1)
        for first in range(0, max(len(rows), 1), unit):
            part = rows[first : first + unit]
            unit_loss, unit_tokens = self._write_gradients(part)
            good = self.sums.add(fresh=first == 0)
            if not (good and isfinite(unit_loss)) and not self._complaint:
                self._complaint = self._describe_bad(part)
            loss, tokens = loss + self.sums.rounded(unit_loss), tokens + unit_tokens
        return self._small_sums(loss, tokens)

    def _small_sums(self, loss: float, tokens: int) -> NDArray[np.float64]:
        """Return [loss_sum, n_tokens, bad leaves, requests to stop, requests to save] of this rank."""
        save = self.comms.rank == 0 and self.save_due(self.progress.step + 1)
        return np.array([loss, tokens, bool(self._complaint), self.rank.stopping.requested(), save], np.float64)

    def _write_gradients(self, rows: NDArray[np.int32]) -> tuple[float, int]:
        """Write the gradient of these sequences, or zeros without any, over the old content of the gradient buffer."""
        room, result = self.sums.room, (0.0, 0)
        if not len(rows):
            room[:] = 0
        else:
            batch = records_to_batch(rows, self.config.train.seed, self.progress.step)
            result = self._from_outside(batch) if self.rank.outside_model else self._from_model(batch)
        fault = self.phases.planted_nan()
        if fault is not None:
            spec = self.model.parameters.specs[fault.tensor]
            room[self.model.parameters.offsets[spec.name]] = np.nan
        return result

    def _from_model(self, batch: Batch) -> tuple[float, int]:
        if self._writing is not None:
            with self.rank.slots:
                return self._writing.write_gradients(batch, self.sums.room)
        self.sums.room[:] = 0
        with self.rank.slots:
            return self.model.loss_and_gradients(batch, self.sums.room)

    def _from_outside(self, batch: Batch) -> tuple[float, int]:
        """Compute the same with a model from outside. Raises PluginError where it raises or breaks its contract."""
        with plugin_errors(self.rank.outside_model):
            result = self._from_model(batch)
        return check_result(self.rank.outside_model, result, batch)

    def _optimize(self, sums: NDArray[np.float64], total: NDArray) -> Verdict:
        """Decide on the step and, unless it must be skipped, update the owned parameters.

        All ranks that decide reach the same verdict; the other ranks receive it later. The call is collective over the
        hierarchy.
        """
        optimizer = self.rank.optimizer if self.reduction.decides else None
        findings, tokens = None, int(sums[1])
        if optimizer is not None:
            total = self.sums.total(optimizer.spans, total)
            findings = optimizer.findings(total, optimizer.couple(total, tokens))
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
        progress.updates += bool(verdict.applied)
        self.sequences += len(rows)
        self.tokens += int((rows[:, ID_COLUMNS + 1 :] >= 0).sum())
        if self.source and batch:
            self.source.router.record(batch.dealt)
        if verdict.applied:
            self.model.parameters.flip()
            if self.rank.optimizer is not None:
                self.rank.optimizer.commit()
            progress.skipped_in_a_row = 0
            return
        if self.sums.looks_later and not self._complaint and not all_finite(self.sums.vector):
            self._complaint = self._describe_bad(rows)
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._report_skip(verdict)
        if progress.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            outside = f"{self.rank.outside_model}: " if self.rank.outside_model else ""
            error = UserError(
                f"{outside}{MOST_SKIPPED_IN_A_ROW} steps in a row up to step {progress.step} gave a loss or gradient "
                "that is not finite: lower optimizer.learning_rate, or go back to a checkpoint with --resume PATH"
            )
            error.everywhere = True
            raise error

    def _describe_bad(self, rows: NDArray[np.int32]) -> str:
        names = self.sums.complaints(self.model.parameters.views(self.sums.room)) or ["the loss"]
        ids, _ = unpack_records(rows)
        where = f"in sequences {_shorten([str(i) for i in ids])}" if len(ids) else "in no sequence"
        return f"{_shorten(names)} {where}"

    def _report_skip(self, verdict: Verdict) -> None:
        """Log the leaves, tensors and sequences behind a skipped step. Collective over the world."""
        complaints = gather_objects(self.comms.world, self._complaint, self.comms.waiter)
        if complaints is None:
            return
        told = [f"rank {rank}: {text}" for rank, text in enumerate(complaints) if text]
        reason = _shorten(told, "; ") if told else f"the gradient norm of the whole batch is {verdict.grad_norm}"
        logger.warning("step %d skipped, not finite: %s", self.progress.step, reason)


def _shorten(names: list[str], separator: str = ", ", most: int = 4) -> str:
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more

