"""A training run from its command line to its exit code, on every rank."""

import argparse
import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hiermpi.communication.agreement import agree, broadcast_object, gather_objects
from hiermpi.communication.autotune import make_reduction
from hiermpi.communication.communicators import Communicators
from hiermpi.communication.compute_slots import make_turns
from hiermpi.communication.reduction import Reduction, Vectors, hand_down
from hiermpi.communication.scatter import make_scatter
from hiermpi.communication.sharded_state import deal_out_owned, gather_owned
from hiermpi.communication.shutdown import ErrorSink, set_error_sink
from hiermpi.communication.waiting import Waiter
from hiermpi.config.schema import Config, duration_seconds
from hiermpi.data.rows import ID_COLUMNS
from hiermpi.data.sampling import Sampler
from hiermpi.errors import EXIT_DONE, EXIT_STOPPED, UserError
from hiermpi.hierarchy.routing import Router
from hiermpi.kernels import load_kernels
from hiermpi.kernels.memory import lazy_zeros
from hiermpi.model.symmetry import symmetry_groups
from hiermpi.model.transformer import Transformer
from hiermpi.optimizer.slots import slots_of
from hiermpi.optimizer.sums import differing, routed_together, summed_type
from hiermpi.signals import StopRequests
from hiermpi.training.batches import BatchSource, EvaluationSource
from hiermpi.training.evaluation import Evaluation
from hiermpi.training.evaluator import Evaluator
from hiermpi.training.faults import Fault, parse_faults
from hiermpi.training.phases import Phases
from hiermpi.training.placement import make_optimizer, optimizer_settings, ownership_of
from hiermpi.training.summary import gather_ranks
from hiermpi.training.trainer import Progress, Trainer

# Rank 0 alone imports the storage layer (opening, recording): h5py is paid once, not once per rank.

if TYPE_CHECKING:
    from hiermpi.training.opening import OpenedRun
    from hiermpi.training.recording import Recorder, Saver

logger = logging.getLogger("hiermpi")


@dataclass(frozen=True)
class Start:
    """What rank 0 tells the others before work begins."""

    config: Config
    run: str
    finished: bool
    step: int
    cursor: int
    skipped: int
    adam_count: int
    reductions: dict[str, str]
    """What ``hierarchy.reduction = auto`` chose at earlier starts, by ranks and ranks per node."""
    faults: tuple[Fault, ...]


def train(arguments: argparse.Namespace, world: MPI.Comm) -> int:
    """Run ``hiermpi train``; return its exit code. Collective over ``world``."""
    opened, start = open_everywhere(arguments, world)
    if start.finished:
        if opened is not None:
            print(f"{start.run} is done at step {start.step}: a larger --train.steps continues it")
        return EXIT_DONE
    set_error_sink(write_error_to(start.run))
    config = start.config
    comms = Communicators(
        world,
        config.model.symmetry_order,
        config.hierarchy.coordinators,
        config.run.stall_warn,
        config.run.stall_abort,
    )
    session = Session(start, comms, opened)
    code = session.run()
    session.reduction.free()
    comms.free()
    return code


def open_everywhere(arguments: argparse.Namespace, world: MPI.Comm) -> tuple["OpenedRun | None", Start]:
    """Open the run on rank 0 and tell every rank; an error there is raised everywhere. Collective over ``world``."""
    opened, start, error = None, None, None
    if world.rank == 0:
        from hiermpi.training.opening import describe_start, open_run

        try:
            faults = parse_faults(os.environ)
            opened = open_run(arguments, world.size)
            saved = opened.checkpoint
            start = Start(
                opened.config,
                str(arguments.run),
                opened.finished,
                saved.step if saved else 0,
                saved.cursor if saved else 0,
                saved.skipped_steps if saved else 0,
                saved.adam_count if saved else 0,
                opened.folder.read_reductions(),
                faults,
            )
            if not opened.finished:
                logger.info("%s", describe_start(opened))
        except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
            error = caught
    waiter = Waiter()
    agree(world, error, waiter)
    return opened, broadcast_object(world, start, waiter)


def write_error_to(run: str) -> ErrorSink:
    """A sink for tracebacks that writes into the run folder."""

    def sink(rank: int, text: str) -> str:
        from hiermpi.storage.run_folder import RunFolder

        return str(RunFolder(run).write_error(rank, text))

    return sink


def limit_threads(threads: int, comms: Communicators) -> None:
    """Give this rank's BLAS its threads; warn where the ranks of the node then have more than its cores."""
    if threads > 1:
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads, user_api="blas")
        load_kernels().own_products = False  # they know one thread
        cores = os.cpu_count() or 1
        if comms.rank == 0 and comms.node.size * threads > cores:
            logger.warning(
                "%d ranks of %d threads share the %d cores of this node: start fewer ranks, or lower "
                "run.threads_per_rank",
                comms.node.size,
                threads,
                cores,
            )


def require_one_kind(comms: Communicators) -> None:
    """Refuse ranks whose kernels or BLAS differ: they would not compute the same bits. Collective over the world.

    Raises UserError on every rank.
    """
    kinds = gather_objects(comms.world, arithmetic(), comms.waiter)
    found = differing(kinds) if kinds else None
    error = None
    if kinds and found:
        one, other = found
        error = UserError(
            f"hierarchy.reproducible: rank {one} computes with {kinds[one]}, rank {other} with {kinds[other]}: start "
            "on nodes of one kind, or set HIERMPI_KERNELS and OPENBLAS_CORETYPE to what all of them have"
        )
    agree(comms.world, error, comms.waiter)


def arithmetic() -> str:
    """What this rank's results depend on: its kernels, and its BLAS with the processor that it is tuned for."""
    from threadpoolctl import threadpool_info

    libraries = {
        f"{entry['internal_api']} {entry.get('version')} for {entry.get('architecture', 'any processor')}"
        for entry in threadpool_info()
        if entry["user_api"] == "blas"
    }
    return f"{load_kernels().name} kernels and {' and '.join(sorted(libraries)) or 'an unknown BLAS'}"


class Session:
    """Everything a rank holds during a run. Its constructor and methods are collective over the hierarchy.

    Args:
        start: from rank 0.
        comms: the hierarchy.
        opened: at the root, what it opened.
    """

    def __init__(self, start: Start, comms: Communicators, opened: "OpenedRun | None") -> None:
        self.start = start
        self.comms = comms
        self.opened = opened
        self.config = config = start.config
        limit_threads(config.run.threads_per_rank, comms)
        if config.hierarchy.reproducible:
            require_one_kind(comms)
        self.groups = self._groups()
        self.ownership = ownership_of(config, comms.topology, self.groups)
        self.reduction = self._reduction()
        self.phases = Phases(comms.rank, comms.waiter, start.faults)
        self.progress = Progress(start.step, start.cursor, start.skipped)
        self.stopping = self._stop_requests()
        self.model = self._model()
        turns = make_turns(comms, self.model, config.run.threads_per_rank)
        state = self.reduction.state_slots()
        self.optimizer = make_optimizer(config, self.model, state, self.ownership, comms.rank)
        self._load_state()
        self._saved_step = start.step if start.step else -1
        scatter = make_scatter(
            comms,
            ID_COLUMNS + config.model.context_length + 1,
            max(config.train.batch_size, comms.topology.n_leaves),
            in_memory=self.reduction.shares_memory,
        )
        self.trainer = Trainer(
            config,
            comms,
            self.model,
            self.reduction,
            scatter,
            self.phases,
            self.stopping,
            turns,
            self.progress,
            optimizer_settings(config).learning_rate,
            self._source(),
            self.optimizer,
        )
        self.evaluator = Evaluator(
            self.model,
            comms,
            scatter,
            self.reduction.sum_everywhere,
            self._evaluation_source(),
            max(config.train.batch_size, comms.topology.n_leaves),
            turns,
            self.stopping.requested,
        )

    def run(self) -> int:
        """Train to the end or to a request to stop; return the exit code."""
        recorder, saver = self._recording()
        if saver:
            self.trainer.save_due = saver.due
        self.started = time.perf_counter()
        with recorder.bar if recorder else nullcontext():
            stopped, evaluation = self._loop(recorder, saver)
        if not stopped and evaluation is None:
            evaluation = self.evaluator.evaluate()
            stopped = evaluation is None
        with self.phases("checkpoint"):
            self._save(recorder, saver, final=True)
        self._finish(recorder, saver, stopped, evaluation)
        return EXIT_STOPPED if stopped else EXIT_DONE

    def _loop(self, recorder: "Recorder | None", saver: "Saver | None") -> tuple[bool, Evaluation | None]:
        train = self.config.train
        while self.progress.step < train.steps:
            result = self.trainer.step()
            stop, evaluation = result.stop, None
            last = result.step == train.steps
            if last or (train.eval_interval and result.step % train.eval_interval == 0):
                with self.phases("evaluate"):
                    evaluation = self.evaluator.evaluate()
                stop = stop or evaluation is None
            if recorder:
                recorder.record(result, evaluation)
            if last and evaluation is not None:
                return False, evaluation
            if stop:
                return True, None
            if result.save:
                with self.phases("checkpoint"):
                    self._save(recorder, saver)
        return False, None

    def _save(self, recorder: "Recorder | None", saver: "Saver | None", final: bool = False) -> None:
        """Save the owners' state at the root, unless that is on disk already.

        With ``final`` all ranks wait until it is, and a failure is everyone's. Collective over the hierarchy.
        """
        error = None
        unsaved = self.progress.step != self._saved_step
        self._saved_step = self.progress.step
        mine = self.optimizer.moments._asdict() if self.optimizer else None
        whole = gather_owned(self.comms, self.ownership, mine) if unsaved else None
        try:
            if recorder and saver:
                if whole is not None:
                    saver.save(recorder.last_loss, whole["m"], whole["v"])
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
    ) -> None:
        elapsed = time.perf_counter() - self.started
        records = gather_ranks(self.trainer, self.comms, self.start.step, elapsed)
        if not (records and recorder and saver and self.opened):
            return
        from hiermpi.reporting.tables import load_lines, machine_lines, phase_table

        folder = self.opened.folder
        folder.write_ranks(records)
        lines = self._result_lines(recorder.last_loss, stopped, evaluation)
        lines += ["", *phase_table(records), *machine_lines(records), *load_lines(records[0])]
        lines += ["", f"{'checkpoint':22}{saver.finish()}"]
        if stopped:
            folder.clear_stop()
            lines.append(f"{'next':22}the same command again continues")
        else:
            folder.mark_done(f"step {self.progress.step}\n")
            lines.append(f"{'next':22}hiermpi evaluate {folder.path} --data {self.opened.dataset.path}")
        print("\n".join(lines))
        sys.stdout.flush()

    def _result_lines(self, loss: float, stopped: bool, evaluation: Evaluation | None) -> list[str]:
        progress = self.progress
        what = f"stopped by {self.stopping.reason or 'a signal on another rank'}" if stopped else "done"
        lines = [f"{what} after step {progress.step} of {self.config.train.steps}", f"{'loss':22}{loss:.4f} nats"]
        if evaluation and self.opened:
            dataset = self.opened.dataset
            bits = evaluation.bits_per_byte(dataset.length("val") / max(dataset.val_bytes, 1))
            lines.append(f"{'validation':22}{evaluation.loss:.4f} nats per token, {bits:.3f} bits per byte")
        if progress.skipped:
            lines.append(f"{'skipped steps':22}{progress.skipped}")
        return lines

    def _stop_requests(self) -> StopRequests:
        if self.opened is None:
            return StopRequests()
        return StopRequests(self.opened.folder.stop_requested, duration_seconds(self.config.run.time_limit))

    def _reduction(self) -> Reduction:
        """As configured; a choice by time is kept in the run folder, so that a resumed run sums in the same way."""
        config, place = self.config.hierarchy, self.comms.topology.layout
        known = "" if config.retune else self.start.reductions.get(place, "")
        vectors = Vectors(summed_type(self.config), slots_of(self.config))
        chosen = make_reduction(config.reduction, self.comms, self.ownership, vectors, known)
        error = None
        if self.opened and chosen.seconds:
            times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in chosen.seconds.items())
            logger.info("hierarchy.reduction: %s (%s)", chosen.name, times)
            try:
                self.opened.folder.keep_reduction(place, chosen.name)
            except UserError as caught:
                error = caught
        agree(self.comms.world, error, self.comms.waiter)
        return chosen.reduction

    def _groups(self) -> NDArray[np.uint8]:
        """(V,) symmetry class of each token id."""
        shape = self.config.model
        known = self.opened.dataset.symmetry_group if self.opened else None
        groups = symmetry_groups(known, shape.vocab_size, shape.symmetry_order)
        hand_down(self.comms, groups)
        return groups

    def _model(self) -> Transformer:
        """The model, with room for its parameters on every rank."""
        error, model = None, None
        try:
            model = Transformer(
                self.config.model,
                self.groups,
                storage=self.reduction.parameter_slots(),
                micro_batch_size=self.config.train.micro_batch_size,
            )
        except MemoryError as caught:
            error = caught
        agree(self.comms.world, error, self.comms.waiter)
        assert model is not None
        return model

    def _load_state(self) -> None:
        """Moments and parameters, from the checkpoint or initialised. Collective over the hierarchy."""
        saved, model = self.opened.checkpoint if self.opened else None, self.model
        if saved is not None:
            model.load_token_order(saved.parameters, model.parameters.vector)
        elif self.opened:
            model.initialize(self.config.train.seed)
        self.reduction.share(model.parameters.vector)
        if not self.start.adam_count:
            return
        if self.optimizer:
            self.optimizer.count = self.start.adam_count
        for name in ("m", "v"):
            whole = None
            if saved is not None:
                whole = {name: lazy_zeros(model.parameters.size, np.float32)}
                model.load_token_order(saved.state[name], whole[name])
            mine = {name: getattr(self.optimizer.moments, name)} if self.optimizer else None
            deal_out_owned(self.comms, self.ownership, whole, mine)

    def _source(self) -> BatchSource | None:
        if self.opened is None:
            return None
        dataset, config = self.opened.dataset, self.config
        sampler = Sampler(dataset.length("train"), config.model.context_length, config.train.seed)
        tables = (dataset.symmetry_group, dataset.counts)
        router = Router(self.comms.topology, config.hierarchy.routing, *tables, routed_together(config))
        return BatchSource(dataset, sampler, router, self.model.symmetry.row_of_token, config.train.batch_size)

    def _evaluation_source(self) -> EvaluationSource | None:
        if self.opened is None:
            return None
        limit = self.config.train.eval_batches * self.config.train.batch_size
        return EvaluationSource(
            self.opened.dataset, "val", self.config.model.context_length, self.model.symmetry.row_of_token, limit
        )

    def _recording(self) -> "tuple[Recorder | None, Saver | None]":
        """The root's recorder and saver, with the run folder brought back to the resumed step."""
        if self.opened is None or self.optimizer is None:
            return None, None
        from hiermpi.config.loading import config_to_toml
        from hiermpi.progress import ProgressBar
        from hiermpi.training.recording import Recorder, Saver

        folder, config = self.opened.folder, self.config
        folder.clear_done()
        folder.clear_stop()
        folder.write_config(config_to_toml(config))
        if self.opened.goes_back:
            folder.set_aside_after(self.progress.step)
        folder.truncate_metrics(self.progress.step)
        bar = ProgressBar("training", config.train.steps, self.progress.step, lines=False)
        recorder = Recorder(folder, config, self.progress.step, self.phases, bar)
        saver = Saver(folder, config, self.opened.dataset, self.model, self.optimizer, self.progress)
        return recorder, saver
