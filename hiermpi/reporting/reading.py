"""A run folder as data for tables and plots."""

import statistics
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hiermpi.errors import UserError
from hiermpi.files import told
from hiermpi.storage.run_folder import RunFolder

LAST_STEPS = 20
"""Over which the final training loss and speed are averaged."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says. Rows and records that lack what they should have are refused."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    """Of the last start; empty where the run has not ended in order."""
    done: bool

    @property
    def name(self) -> str:
        """A short name."""
        return self.path.name or str(self.path)

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of the steps that were not skipped."""
        return [(row["step"], row["loss"]) for row in self.metrics if row["loss"] is not None]

    @cached_property
    def validations(self) -> list[tuple[int, float]]:
        """(step, validation loss)."""
        return [(row["step"], row["val_loss"]) for row in self.metrics if row.get("val_loss") is not None]

    @property
    def root(self) -> dict[str, Any] | None:
        """The root's record."""
        return next((record for record in self.ranks if record["role"] == "root"), None)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """Records of the ranks that have computed: workers, or without any the others that did."""
        computing = [record for record in self.ranks if record["sequences"]]
        below = [record for record in computing if record["role"] == "worker"]
        return below or [record for record in computing if record["role"] == "control"] or computing

    def summary(self) -> dict[str, Any]:
        """The main figures, as plain data."""
        last = [row for row in self.metrics[-LAST_STEPS:] if row["loss"] is not None]
        best = min(self.validations, key=lambda pair: pair[1], default=(None, None))
        rates = [row["tokens_per_second"] for row in self.metrics if row.get("tokens_per_second")]
        return {
            "run": str(self.path),
            "done": self.done,
            "step": self.metrics[-1]["step"] if self.metrics else 0,
            "steps": self.config.get("train.steps"),
            "ranks": len(self.ranks) or None,
            "hosts": sorted({record["host"] for record in self.ranks}),
            "loss": statistics.fmean(row["loss"] for row in last) if last else None,
            "val_loss": self.validations[-1][1] if self.validations else None,
            "best_val_loss": best[1],
            "best_val_step": best[0],
            "tokens": sum(row["tokens"] for row in self.metrics),
            "tokens_per_second": statistics.median(rates) if rates else None,
            "step_seconds": statistics.median(row["step_seconds"] for row in self.metrics) if self.metrics else None,
            "skipped_steps": sum(bool(row.get("skipped")) for row in self.metrics),
        }


def read_run(path: Path) -> RunRecord:
    """The run in folder ``path``. Raises UserError."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: name a run folder of hiermpi train")
    metrics, ranks = folder.read_metrics(), folder.read_ranks()
    if not metrics:
        raise UserError(f"{path} holds no metrics.jsonl with a step: name a run folder that has trained")
    for row in metrics:
        require(row, {"step": int, "loss": (float, int, type(None)), "tokens": int, "step_seconds": float}, folder)
    for record in ranks:
        require(record, {"rank": int, "role": str, "host": str, "sequences": int, "phases": dict}, folder)
        record["waits"] = record.get("waits") or dict.fromkeys(record["phases"], 0.0)
        record["cpu"] = record.get("cpu") or dict.fromkeys(record["phases"], 0.0)
        if not isinstance(record.get("waiting_cpu", 0.0), int | float):
            raise UserError(f"{path}: ranks.jsonl has a record whose waiting_cpu is not a number: remove it")
        if not record["waits"].keys() == record["cpu"].keys() == record["phases"].keys():
            raise UserError(f"{path}: ranks.jsonl has a record with unequal phases: it was not made by hiermpi train")
    return RunRecord(path, read_config(path / "config.toml"), metrics, ranks, folder.is_done())


def require(row: Any, fields: dict[str, Any], folder: RunFolder) -> None:
    """Refuse a row without these fields. Raises UserError."""
    for name, kinds in fields.items():
        if not isinstance(row, dict) or name not in row or not isinstance(row[name], kinds):
            raise UserError(f"{folder.path}: a line of metrics.jsonl or ranks.jsonl has no valid {name}: remove it")


def read_config(path: Path) -> dict[str, Any]:
    """``{"section.field": value}`` of a run's config.toml; empty where there is none. Raises UserError."""
    if not path.exists():
        return {}
    with told(path, "read"):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not valid TOML: {str(error).splitlines()[0]}") from None
    return {
        f"{section}.{key}": value
        for section, entries in table.items()
        if isinstance(entries, dict)
        for key, value in entries.items()
    }
