"""The root records the steps of a run and saves its checkpoints.

A :class:`Recorder` makes one row of each step and gives it to a list of sinks: ``metrics.jsonl``, the lines of the log,
the progress bar, and the sinks that ``run.sinks`` names. Another sink is one class with the methods of :class:`Sink`,
in a file of its own or of the user's.
"""

import copy
import csv
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO, runtime_checkable

from hiermpi.config.registry import SINKS
from hiermpi.config.schema import Config, flatten, listed
from hiermpi.errors import PluginError, plugin_errors
from hiermpi.files import file_errors
from hiermpi.progress import ProgressBar
from hiermpi.storage.checkpoint import Checkpoint, CheckpointWriter
from hiermpi.storage.dataset import TokenDataset
from hiermpi.storage.run_folder import RunFolder, finite
from hiermpi.training.evaluation import Evaluation
from hiermpi.training.phases import Phases
from hiermpi.training.state import RunState
from hiermpi.training.trainer import StepResult

logger = logging.getLogger("hiermpi")


class Run(NamedTuple):
    """The facts about the run that a sink receives when it is opened."""

    folder: Path
    config: Config
    first_step: int
    """The number of steps that were finished before this start."""


class Sink(Protocol):
    """A sink receives the rows of a run. It is a class with these methods and a constructor without arguments.

    A sink may also have ``ranks(records)``, which is called at every log interval with one table for each rank, as in
    ``ranks.jsonl``. An exception in a sink ends the run.
    """

    def open(self, run: Run) -> None:
        """Open the sink; this is called once, before the first step of this start."""

    def record(self, row: Mapping[str, Any]) -> None:
        """Write the row of a step, with the keys of ``metrics.jsonl``."""

    def close(self) -> None:
        """Close the sink; this is called once, also after an error."""


@runtime_checkable
class RanksSink(Protocol):
    """A sink that also receives the records of every rank."""

    def ranks(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records of the ranks, which come in rank order."""


class MetricsSink:
    """A sink that appends to ``metrics.jsonl``."""

    def open(self, run: Run) -> None:
        self._folder = RunFolder(run.folder)

    def record(self, row: Mapping[str, Any]) -> None:
        self._folder.append_metrics(row)

    def close(self) -> None:
        """Do nothing, since each row is written at once."""


class CsvSink:
    """A sink that writes ``metrics.csv``, with one line per step. A resumed run goes on in the same file."""

    COLUMNS = ("step", "loss", "val_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds")

    def open(self, run: Run) -> None:
        self._path = run.folder / "metrics.csv"
        kept: list[dict[str, Any]] = []
        with file_errors(self._path, "write"):
            if run.first_step and self._path.exists():
                with open(self._path, encoding="utf-8", newline="") as before:
                    rows = list(csv.DictReader(before))
                kept = [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) <= run.first_step]
            self._file: TextIO = open(self._path, "w", encoding="utf-8", newline="")  # noqa: SIM115  (until close)
            self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")
            self._writer.writeheader()
            self._writer.writerows(kept)
            self._file.flush()

    def record(self, row: Mapping[str, Any]) -> None:
        with file_errors(self._path, "write"):
            self._writer.writerow(finite(row))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class LogSink:
    """A sink that writes a line to the log at intervals, and shows the steps in a bar on a terminal.

    Args:
        bar: The bar; while it is on a terminal, only the last line and lines with a validation loss are written.
    """

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar

    def open(self, run: Run) -> None:
        self._steps, self._interval = run.config.train.steps, run.config.train.log_interval
        self._first_step = run.first_step
        self._started = self._since = time.perf_counter()
        self._tokens = 0
        self.bar.__enter__()

    def record(self, row: Mapping[str, Any]) -> None:
        self._tokens += row["tokens"]
        last = row["step"] == self._steps or row["stop"]
        validated = "val_loss" in row
        if validated or last or (row["step"] % self._interval == 0 and not self.bar.live):
            self._line(row)
        self.bar.advance(1, f"loss {row['loss']:.4f}")

    def close(self) -> None:
        self.bar.__exit__(None, None, None)

    def _line(self, row: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        per_step = (now - self._started) / (row["step"] - self._first_step)
        validation = f"  val {row['val_loss']:.4f}" if "val_loss" in row else ""
        logger.info(
            "step %*d/%d  loss %.4f%s  lr %.2e  %s tokens/s  %s left",
            len(str(self._steps)),
            row["step"],
            self._steps,
            row["loss"],
            validation,
            row["learning_rate"],
            f"{rate:,.0f}",
            clock_text(per_step * (self._steps - row["step"])),
        )


def clock_text(seconds: float) -> str:
    """Write ``seconds`` as M:SS or H:MM:SS."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def make_sinks(config: Config, bar: ProgressBar) -> list[Sink]:
    """Make the sinks that every run has, and those of ``run.sinks``. Raises UsageError, PluginError."""
    sinks: list[Sink] = [MetricsSink(), LogSink(bar)]
    for text in listed(config.run.sinks):
        made = SINKS.load(text)
        if not SINKS.outside(text):
            sinks.append(made())
            continue
        with plugin_errors(f"run.sinks: {text}"):
            sink = made() if callable(made) else made
            missing = [name for name in ("open", "record", "close") if not callable(getattr(sink, name, None))]
            if missing:
                raise PluginError(f"run.sinks: {text} has no method {missing[0]}: a sink needs open, record and close")
            sinks.append((OutsideRanksSink if isinstance(sink, RanksSink) else OutsideSink)(sink, f"run.sinks: {text}"))
    return sinks


class OutsideSink:
    """A sink from outside, which cannot alter a row. Its exceptions become a PluginError of one sentence.

    Args:
        sink: The user's sink.
        what: The text by which messages name it.
    """

    def __init__(self, sink: Any, what: str) -> None:
        self.sink = sink
        self.what = what

    def open(self, run: Run) -> None:
        with plugin_errors(self.what):
            self.sink.open(run)

    def record(self, row: Mapping[str, Any]) -> None:
        with plugin_errors(self.what):
            self.sink.record(copy.deepcopy(dict(row)))

    def close(self) -> None:
        with plugin_errors(self.what):
            self.sink.close()


class OutsideRanksSink(OutsideSink):
    """A sink from outside that also receives the records of every rank."""

    def ranks(self, records: Sequence[Mapping[str, Any]]) -> None:
        with plugin_errors(self.what):
            self.sink.ranks(records)


class Recorder:
    """A context that makes the rows, gives them to the sinks, and closes the sinks at its end.

    Args:
        run: The facts that the sinks receive.
        sinks: The sinks that receive the rows.
        phases: The phases of the root.
    """

    def __init__(self, run: Run, sinks: Sequence[Sink], phases: Phases) -> None:
        self.run = run
        self.sinks = list(sinks)
        self.phases = phases
        self.last_loss = float("nan")
        self._before = dict(phases.seconds)
        self._opened = ExitStack()

    @property
    def wants_ranks(self) -> bool:
        """Return whether some sink wants the records of every rank at each log interval."""
        return any(isinstance(sink, RanksSink) for sink in self.sinks)

    def __enter__(self) -> "Recorder":
        for sink in self.sinks:
            try:
                sink.open(self.run)
            except BaseException:
                self._opened.close()
                raise
            self._opened.callback(sink.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def record(self, result: StepResult, evaluation: Evaluation | None) -> None:
        """Give the row of a committed step to every sink."""
        seconds = self.phases.seconds
        row = {
            "step": result.step,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "tokens_per_second": result.tokens / result.seconds,
            "step_seconds": result.seconds,
            "phases": {name: round(seconds[name] - self._before[name], 6) for name in seconds},
        }
        if evaluation is not None:
            row["val_loss"] = evaluation.loss
        if self.run.config.lattice.coupling:
            row["lattice_loss"] = result.lattice_loss
        if not result.applied:
            row["skipped"] = True
        else:
            self.last_loss = result.loss
        self._before = dict(seconds)
        for sink in self.sinks:
            sink.record(row | {"stop": result.stop} if isinstance(sink, LogSink) else row)

    def ranks(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Give the records of the ranks to the sinks that want them."""
        for sink in self.sinks:
            if isinstance(sink, RanksSink):
                sink.ranks(records)


class Saver:
    """A saver that writes checkpoints of the run when they are due.

    Args:
        folder: The folder of the run.
        config: The resolved configuration.
        dataset: The dataset, whose identity and tokenizer are saved with the model.
        step: The step that is saved already, or 0.
    """

    def __init__(self, folder: RunFolder, config: Config, dataset: TokenDataset, step: int) -> None:
        self.folder = folder
        self.config = config
        self.dataset = dataset
        self._saved_step = step
        self._saved_at = time.monotonic()
        settings = config.checkpoint
        self._writer = CheckpointWriter(
            folder.checkpoints,
            asynchronous=settings.asynchronous,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
        )

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step``."""
        settings = self.config.checkpoint
        by_steps = settings.interval and step % settings.interval == 0
        by_time = settings.minutes and time.monotonic() - self._saved_at > 60 * settings.minutes
        return bool(by_steps or by_time)

    def save(self, loss: float, state: RunState) -> None:
        """Start to save ``state``, whose last step had the loss ``loss`` in nats per token."""
        progress = state.progress
        self._writer.save(
            Checkpoint(
                step=progress.step,
                cursor=progress.cursor,
                seed=self.config.train.seed,
                adam_count=progress.updates,
                skipped_steps=progress.skipped,
                config=flatten(self.config),
                tokenizer=self.dataset.tokenizer,
                dataset_sha256=self.dataset.sha256,
                parameters=dict(state.parameters),
                state={name: dict(tensors) for name, tensors in state.optimizer.items()},
                loss=loss,
            )
        )
        self._saved_step = progress.step
        self._saved_at = time.monotonic()

    def finish(self) -> Path:
        """Wait for the checkpoint under way, and return the newest one's path. Raises UserError where it failed."""
        self._writer.finish()
        return self.folder.checkpoints.path_for(self._saved_step)
