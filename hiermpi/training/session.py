"""A training run goes from its settings to its result on the ranks of a communicator."""

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiermpi.communication.agreement import agree, agreed, broadcast_object, from_root, gather_objects
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.waiting import Waiter
from hiermpi.config.schema import Config, duration_seconds
from hiermpi.model.contract import load_family
from hiermpi.signals import StopRequests
from hiermpi.training.assembly import Choices, Rank, assemble
from hiermpi.training.batches import EvaluationSource
from hiermpi.training.evaluation import Evaluation, Evaluator
from hiermpi.training.phases import Fault, parse_faults
from hiermpi.training.state import Progress, RunState, gather_state
from hiermpi.training.trainer import Trainer

# Only rank 0 imports the storage layer (opening, recording), so that one rank loads h5py, not all.

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.training.opening import OpenedRun
    from hiermpi.training.recording import Recorder, Saver

logger = logging.getLogger("hiermpi")


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run; it is the same on every rank, except for what only the root knows."""

    run: str
    step: int
    """The number of finished steps."""
    steps: int
    """The number of steps of the whole run."""
    loss: float
    """The loss of the last step that was not skipped, in nats per token; NaN where this start made none."""
    validation_loss: float | None
    """The loss over the validation split, in nats per token; None where the run was stopped before."""
    bits_per_byte: float | None
    """The same loss in bits per byte of the text."""
    stopped: bool
    """This is true if the run was asked to stop; the same call again continues it."""
    reason: str = ""
    """The request that stopped the run; empty where none did."""
    skipped: int = 0
    """The number of steps that were skipped for a non-finite loss or gradient."""
    already_done: bool = False
    """This is true if the run was done before, so that this start did nothing."""
    checkpoint: str = ""
    """The path of the newest checkpoint (root only)."""
    ranks: tuple[dict[str, Any], ...] = ()
    """The record of each rank, as in ``ranks.jsonl`` (root only)."""


@dataclass(frozen=True)
class Start:
    """The facts that rank 0 sends to the other ranks before work begins."""

    config: Config
    finished: bool
    progress: Progress
    reductions: dict[str, str]
    """The reductions that earlier starts chose by time for ``hierarchy.reduction``, by ranks and ranks per node."""
    faults: tuple[Fault, ...]


def train(
    config: Config,
    *,
    data: Path | str,
    run: Path | str,
    resume: str = "auto",
    family: Any = None,
    rule: Any = None,
    reduction: Any = None,
    routing: Any = None,
    comm: "MPI.Comm | None" = None,
) -> TrainResult:
    """Train a model on the ranks of ``comm``, or go on with a run. Collective over ``comm``.

    The call leaves nothing behind: it finalizes no MPI, ends no process, and restores the signal handlers.

    Args:
        config: The settings; those of rank 0 count.
        data: The dataset, made by :func:`hiermpi.prepare` or ``hiermpi prepare``.
        run: The run folder, new or to be continued.
        resume: The word ``auto`` for the newest whole checkpoint of the run, ``none`` for a new start, or the path of a
            checkpoint.
        family: A model family of the user's own, in place of ``model.family``; an object, the same on every rank.
        rule: An optimizer rule of the user's own, in place of ``optimizer.rule``.
        reduction: A reduction of the user's own, in place of ``hierarchy.reduction``.
        routing: A routing rule of the user's own, in place of ``hierarchy.routing``.
        comm: The communicator of the ranks; by default all that the launcher started.

    Returns:
        The result, the same on every rank except for what only the root knows.

    Raises:
        UserError: An argument is wrong; every rank raises it before any work.
    """
    from mpi4py import MPI

    choices = Choices(family, rule, reduction, routing)
    return run_training(comm or MPI.COMM_WORLD, lambda: config, Path(data), Path(run), resume, choices)


def run_training(
    world: "MPI.Comm",
    make_config: Callable[[], Config],
    data: Path,
    run: Path,
    resume: str = "auto",
    choices: Choices | None = None,
) -> TrainResult:
    """Train as :func:`train` does, with a configuration that rank 0 alone makes. Collective over ``world``.

    Args:
        world: The communicator of the ranks.
        make_config: The function that makes the configuration; it is called on rank 0 alone.
        data: The dataset.
        run: The run folder.
        resume: The word ``auto``, ``none``, or the path of a checkpoint.
        choices: Objects of the user's own.

    Returns:
        The result, the same on every rank except for what only the root knows.

    Raises:
        UserError: An argument is wrong; every rank raises it before any work.
    """
    choices = choices or Choices()
    opened: list[OpenedRun] = []

    def open_here() -> Start:
        from hiermpi.training.opening import describe_start, open_run

        faults, config = parse_faults(os.environ), choices.named_in(make_config())
        family = load_family(choices.family or config.model.family)
        found = open_run(config, data, run, resume, family, world.size)
        opened.append(found)
        if not found.finished:
            logger.info("%s", describe_start(found))
        saved = found.checkpoint
        progress = Progress(saved.step, saved.cursor, saved.skipped_steps, saved.adam_count) if saved else Progress()
        return Start(found.config, found.finished, progress, found.folder.read_reductions(), faults)

    start = from_root(world, open_here, Waiter())
    if start.finished:
        return TrainResult(
            str(run), start.progress.step, start.config.train.steps, float("nan"), None, None, False, already_done=True
        )
    hierarchy, limits = start.config.hierarchy, start.config.run
    comms = Communicators(
        world, start.config.model.symmetry_order, hierarchy.coordinators, limits.stall_warn, limits.stall_abort
    )
    with stop_requests(start.config, opened[0] if opened else None) as stopping:
        session = Session(start, comms, str(run), opened[0] if opened else None, choices, stopping)
        result = session.run()
    session.rank.free()
    comms.free()
    return result


def stop_requests(config: Config, opened: "OpenedRun | None") -> StopRequests:
    """Make the handler of requests to stop, which at the root also looks at the STOP file and the time limit."""
    if opened is None:
        return StopRequests()
    return StopRequests(opened.folder.stop_requested, duration_seconds(config.run.time_limit))


class Session:
    """A run on one rank. The constructor and :meth:`run` are collective over the hierarchy.

    Args:
        start: The facts that rank 0 sent.
        comms: The hierarchy.
        run: The run folder.
        opened: The objects that rank 0 opened; None elsewhere.
        choices: Objects of the user's own.
        stopping: The requests to stop on this rank.
    """

    def __init__(
        self,
        start: Start,
        comms: Communicators,
        run: str,
        opened: "OpenedRun | None",
        choices: Choices,
        stopping: StopRequests,
    ) -> None:
        self.start = start
        self.folder = run
        self.opened = opened
        self.config = config = start.config
        self.comms = comms
        self.stopping = stopping
        layout = comms.topology.layout
        saved = opened.checkpoint if opened else None
        self.rank = rank = assemble(
            config,
            comms,
            data=opened.dataset if opened else None,
            state=RunState(start.progress, saved.parameters, saved.state) if saved else None,
            progress=start.progress,
            choices=choices,
            known="" if config.hierarchy.retune else start.reductions.get(layout, ""),
            stopping=stopping,
            faults=start.faults,
        )
        self._keep_reduction(layout)
        self._saved_step = rank.progress.step or -1
        source = None
        with agreed(comms.world, comms.waiter):
            if opened:
                source = rank.batch_source(opened.dataset)
        self.trainer = Trainer(rank, source)
        windows = None
        if opened:
            limit = config.train.eval_batches * config.train.batch_size
            table = rank.model.parameters.row_of_token
            windows = EvaluationSource(opened.dataset, "val", config.model.context_length, table, limit)
        self.evaluator = Evaluator(rank, windows, max(config.train.batch_size, comms.topology.n_leaves))

    def run(self) -> TrainResult:
        """Train to the end or to a request to stop. Collective over the hierarchy."""
        recorder, saver = self._recording()
        if saver:
            self.trainer.save_due = saver.due
        self._listening = broadcast_object(
            self.comms.world, bool(recorder and recorder.wants_ranks), self.comms.waiter
        )
        self.started = time.perf_counter()
        with recorder or nullcontext():
            stopped, evaluation = self._loop(recorder, saver)
        if not stopped and evaluation is None:
            evaluation = self.evaluator.evaluate()
            stopped = evaluation is None
        with self.rank.phases("checkpoint"):
            self._save(recorder, saver, final=True)
        return self._finish(recorder, saver, stopped, evaluation)

    def _loop(self, recorder: "Recorder | None", saver: "Saver | None") -> tuple[bool, Evaluation | None]:
        train = self.config.train
        while self.rank.progress.step < train.steps:
            result = self.trainer.step()
            if recorder and result.step == self.start.progress.step + 1:
                warn_of_unread(self.rank)
            stop, evaluation = result.stop, None
            last = result.step == train.steps
            if last or (train.eval_interval and result.step % train.eval_interval == 0):
                with self.rank.phases("evaluate"):
                    evaluation = self.evaluator.evaluate()
                stop = stop or evaluation is None
            if recorder:
                recorder.record(result, evaluation)
            if self._listening and result.step % train.log_interval == 0:
                records = self._gather_ranks()
                if recorder and records:
                    recorder.ranks(records)
            if last and evaluation is not None:
                return False, evaluation
            if stop:
                return True, None
            if result.save:
                with self.rank.phases("checkpoint"):
                    self._save(recorder, saver)
        return False, None

    def _save(self, recorder: "Recorder | None", saver: "Saver | None", final: bool = False) -> None:
        """Save the state at the root, unless it is on disk already. Collective over the hierarchy.

        Args:
            recorder: The recorder, at the root; None elsewhere.
            saver: The saver, at the root; None elsewhere.
            final: Whether all ranks wait until the state is saved, and a failure is raised on every rank.
        """
        error = None
        unsaved = self.rank.progress.step != self._saved_step
        self._saved_step = self.rank.progress.step
        state = gather_state(self.rank) if unsaved else None
        try:
            if recorder and saver:
                if state is not None:
                    saver.save(recorder.last_loss, state)
                if final:
                    saver.finish()
        except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
            error = caught
            if not final:
                logger.error("%s; training goes on, the next checkpoint tries again", caught)
        if final:
            agree(self.comms.world, error, self.comms.waiter)

    def _finish(
        self, recorder: "Recorder | None", saver: "Saver | None", stopped: bool, evaluation: Evaluation | None
    ) -> TrainResult:
        """Write the ranks' records, mark the run done or stopped, and send the result to every rank.

        The call is collective over the world.

        Args:
            recorder: The recorder, at the root; None elsewhere.
            saver: The saver, at the root; None elsewhere.
            stopped: Whether the run was asked to stop.
            evaluation: The last evaluation over the validation split, or None where the run was stopped before.
        """
        records = self._gather_ranks() or []
        result = None
        with agreed(self.comms.world, self.comms.waiter):
            if recorder and saver and self.opened:
                folder, dataset = self.opened.folder, self.opened.dataset
                folder.write_ranks(records)
                bits = None
                if evaluation:
                    bits = evaluation.bits_per_byte(dataset.length("val") / max(dataset.val_bytes, 1))
                result = TrainResult(
                    self.folder,
                    self.rank.progress.step,
                    self.config.train.steps,
                    recorder.last_loss,
                    evaluation.loss if evaluation else None,
                    bits,
                    stopped,
                    (self.stopping.reason or "a signal on another rank") if stopped else "",
                    self.rank.progress.skipped,
                    checkpoint=str(saver.finish()),
                )
                if stopped:
                    folder.clear_stop()
                else:
                    folder.mark_done(f"step {self.rank.progress.step}\n")
        told: TrainResult = broadcast_object(self.comms.world, result, self.comms.waiter)
        return told if result is None else TrainResult(**{**vars(result), "ranks": tuple(records)})

    def _gather_ranks(self) -> list[dict[str, Any]] | None:
        """Return one record of each rank at the root, and None elsewhere. Collective over the world."""
        elapsed = time.perf_counter() - self.started
        record = rank_record(self.rank, self.trainer, self.start.progress.step, elapsed)
        return gather_objects(self.comms.world, record, self.comms.waiter)

    def _keep_reduction(self, layout: str) -> None:
        """Keep a choice by time in the run folder, so that a resumed run sums in the same way.

        The call is collective over the world.
        """
        seconds, name = self.rank.timed, self.rank.reduction_name
        with agreed(self.comms.world, self.comms.waiter):
            if self.opened and seconds:
                times = ", ".join(f"{which} {1e3 * taken:.1f} ms" for which, taken in seconds.items())
                logger.info("hierarchy.reduction: %s (%s)", name, times)
                self.opened.folder.keep_reduction(layout, name)

    def _recording(self) -> "tuple[Recorder | None, Saver | None]":
        """Make the root's recorder and saver, and bring the run folder back to the resumed step.

        The call is collective over the world.
        """
        made: list[tuple[Recorder, Saver]] = []
        with agreed(self.comms.world, self.comms.waiter):
            if self.opened is not None:
                made.append(self._recording_at_root(self.opened))
        return made[0] if made else (None, None)

    def _recording_at_root(self, opened: "OpenedRun") -> "tuple[Recorder, Saver]":
        from hiermpi.config.loading import config_to_toml
        from hiermpi.progress import ProgressBar
        from hiermpi.training.recording import Recorder, Run, Saver, make_sinks

        folder, config, step = opened.folder, self.config, self.start.progress.step
        bar = ProgressBar("training", config.train.steps, step, lines=False)
        sinks = make_sinks(config, bar)
        folder.clear_done()
        folder.clear_stop()
        folder.write_config(config_to_toml(config))
        if opened.goes_back:
            folder.set_aside_after(step)
        folder.truncate_metrics(step)
        recorder = Recorder(Run(folder.path, config, step), sinks, self.rank.phases)
        return recorder, Saver(folder, config, opened.dataset, step)


def warn_of_unread(rank: Rank) -> None:
    """Log in one line the changed settings that have no effect on a family or rule from outside."""
    names = rank.unread()
    if names:
        logger.warning("%s: changed, but nothing reads %s", ", ".join(names), "it" if len(names) == 1 else "them")


def rank_record(rank: Rank, trainer: Trainer, first_step: int, elapsed: float) -> dict[str, Any]:
    """Make the record of this rank's work in this start, as in ``ranks.jsonl``.

    Args:
        rank: The parts of this rank.
        trainer: The trainer of this rank.
        first_step: The number of steps that were finished before this start.
        elapsed: The seconds since this start.
    """
    phases, comms, optimizer = rank.phases, rank.comms, rank.optimizer
    record = {
        "rank": comms.rank,
        "role": str(comms.role),
        "group": comms.group_index,
        "host": socket.gethostname(),
        "cores": os.cpu_count() or 1,
        "first_step": first_step,
        "last_step": rank.progress.step,
        "elapsed": round(elapsed, 6),
        "sequences": trainer.sequences,
        "tokens": trainer.tokens,
        "owned_rows": optimizer.rows if optimizer else 0,
        "owned_parameters": optimizer.elements if optimizer else 0,
        "phases": {name: round(seconds, 6) for name, seconds in phases.seconds.items()},
        "waits": {name: round(seconds, 6) for name, seconds in phases.waits.items()},
        "waiting_cpu": round(phases.waiting_cpu, 6),
        "cpu": {name: round(seconds, 6) for name, seconds in phases.cpu.items()},
    }
    if trainer.source is not None:
        router = trainer.source.router
        record |= {
            "loads": router.loads.tolist(),
            "routed_tokens": router.tokens,
            "own_tokens": router.own_tokens,
        }
    return record
