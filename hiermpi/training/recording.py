"""What a run leaves behind while it goes on: log lines, metrics, checkpoints. Rank 0 only."""

import logging
import time
from pathlib import Path

from numpy.typing import NDArray

from hiermpi.config.schema import Config, flatten
from hiermpi.model.transformer import Transformer
from hiermpi.optimizer.update import Optimizer
from hiermpi.progress import ProgressBar
from hiermpi.storage.checkpoint import Checkpoint, CheckpointWriter
from hiermpi.storage.dataset import TokenDataset
from hiermpi.storage.run_folder import RunFolder
from hiermpi.training.evaluation import Evaluation
from hiermpi.training.phases import Phases
from hiermpi.training.trainer import Progress, StepResult

logger = logging.getLogger("hiermpi")


def clock_text(seconds: float) -> str:
    """``seconds`` as M:SS or H:MM:SS."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Recorder:
    """Writes metrics.jsonl and the log.

    Args:
        folder: of the run.
        config: resolved.
        first_step: steps finished before this start.
        phases: of the root.
        bar: shows the steps.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        first_step: int,
        phases: Phases,
        bar: ProgressBar,
    ) -> None:
        self.folder = folder
        self.config = config
        self.first_step = first_step
        self.phases = phases
        self.bar = bar
        self.started = time.perf_counter()
        self.last_loss = float("nan")
        self._before = dict(phases.seconds)
        self._tokens = 0
        self._since = self.started

    def record(self, result: StepResult, evaluation: Evaluation | None) -> None:
        """Write the step's row, and its line where one is due."""
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
        if self.config.lattice.coupling:
            row["lattice_loss"] = result.lattice_loss
        if not result.applied:
            row["skipped"] = True
        else:
            self.last_loss = result.loss
        self._before = dict(seconds)
        self._tokens += result.tokens
        self.folder.append_metrics(row)
        due = evaluation is not None or result.step % self.config.train.log_interval == 0 or self._last(result)
        if due:
            self._line(result, evaluation)
        self.bar.advance(1, f"loss {result.loss:.4f}")

    def _last(self, result: StepResult) -> bool:
        return result.step == self.config.train.steps or result.stop

    def _line(self, result: StepResult, evaluation: Evaluation | None) -> None:
        if self.bar.live and evaluation is None and not self._last(result):
            return  # the bar tells it
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        steps = self.config.train.steps
        per_step = (now - self.started) / (result.step - self.first_step)
        validation = f"  val {evaluation.loss:.4f}" if evaluation else ""
        logger.info(
            "step %*d/%d  loss %.4f%s  lr %.2e  %s tokens/s  %s left",
            len(str(steps)),
            result.step,
            steps,
            result.loss,
            validation,
            result.learning_rate,
            f"{rate:,.0f}",
            clock_text(per_step * (steps - result.step)),
        )


class Saver:
    """Saves the run when it is due.

    Args:
        folder: of the run.
        config: resolved.
        dataset: whose identity and tokenizer go along.
        model, optimizer, progress: the state to save, but for the moments.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        dataset: TokenDataset,
        model: Transformer,
        optimizer: Optimizer,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.config = config
        self.dataset = dataset
        self.model = model
        self.optimizer = optimizer
        self.progress = progress
        self._saved_step = progress.step
        self._saved_at = time.monotonic()
        settings = config.checkpoint
        self._writer = CheckpointWriter(
            folder.checkpoints,
            asynchronous=settings.asynchronous,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``."""
        settings = self.config.checkpoint
        by_steps = settings.interval and step % settings.interval == 0
        by_time = settings.minutes and time.monotonic() - self._saved_at > 60 * settings.minutes
        return bool(by_steps or by_time)

    def save(self, loss: float, m: NDArray, v: NDArray) -> None:
        """Start to save the state of the last committed step.

        Args:
            loss: of that step.
            m, v: the whole moments.
        """
        self._writer.save(self._checkpoint(loss, m, v))
        self._saved_step = self.progress.step
        self._saved_at = time.monotonic()

    def finish(self) -> Path:
        """Wait for the checkpoint under way; return the newest one's path. Raises UserError where it failed."""
        self._writer.finish()
        return self.folder.checkpoints.path_for(self._saved_step)

    def _checkpoint(self, loss: float, m: NDArray, v: NDArray) -> Checkpoint:
        order = self.model.tensors_in_token_order
        return Checkpoint(
            step=self.progress.step,
            cursor=self.progress.cursor,
            seed=self.config.train.seed,
            adam_count=self.optimizer.count,
            skipped_steps=self.progress.skipped,
            config=flatten(self.config),
            tokenizer=self.dataset.tokenizer,
            dataset_sha256=self.dataset.sha256,
            parameters=order(self.model.parameters.vector),
            state={"m": order(m), "v": order(v)},
            loss=loss,
        )
