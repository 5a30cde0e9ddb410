"""A run folder holds config.toml, metrics.jsonl, ranks.jsonl, reductions.json, checkpoints/, errors/, STOP and DONE."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hiermpi.errors import UserError
from hiermpi.files import file_errors, write_bytes, write_whole
from hiermpi.storage.checkpoint import Checkpoint, CheckpointFolder


class RunFolder:
    """The folder of a run; its constructor touches no file.

    Args:
        path: The path of the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")
        self.metrics = self.path / "metrics.jsonl"
        self.done = self.path / "DONE"
        self.stop = self.path / "STOP"
        self.reductions = self.path / "reductions.json"

    def prepare(self) -> None:
        """Make the folder and check that it can be written. Raises UserError."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name a folder with --run")
        with file_errors(self.path, "make the run folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.touch()
            probe.unlink(missing_ok=True)
        self.checkpoints.remove_leftovers()

    def newest_checkpoint(self) -> tuple[Path, Checkpoint]:
        """Return the newest whole checkpoint, without the optimizer's state. Raises UserError where there is none."""
        found = self.checkpoints.newest_valid(with_state=False)
        if found is None:
            raise UserError(f"{self.path} holds no checkpoint: name a run folder of hiermpi train, or a file")
        return found

    def write_config(self, text: str) -> None:
        """Write config.toml."""
        self._write(self.path / "config.toml", text)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl; numbers that are not finite become null."""
        with file_errors(self.metrics, "write"), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a torn last line is left out."""
        return list(_rows(self.metrics))

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after ``step`` and a torn last line; the file is replaced whole or not at all."""
        if self.metrics.exists():
            kept = [row for row in _rows(self.metrics) if row["step"] <= step]
            self._write(self.metrics, lines(kept))

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than ``step``, and copy the metrics as they are to a file that stays."""
        self.checkpoints.set_aside_after(step)
        if self.metrics.exists():
            aside = self.metrics.with_name(self.metrics.name + ".superseded")
            self._write(aside, self.metrics.read_text(encoding="utf-8"))

    def write_ranks(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write ranks.jsonl."""
        self._write(self.path / "ranks.jsonl", lines(records))

    def read_ranks(self) -> list[dict[str, Any]]:
        """Return the records of ranks.jsonl."""
        return list(_rows(self.path / "ranks.jsonl"))

    def write_error(self, rank: int, text: str) -> Path:
        """Write the traceback of a rank into errors/, and return its path."""
        path = self.path / "errors" / f"rank-{rank:04d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def read_reductions(self) -> dict[str, str]:
        """Return the reductions that earlier starts chose by time, by the layout of the ranks. Raises UserError."""
        if not self.reductions.exists():
            return {}
        with file_errors(self.reductions, "read"):
            text = self.reductions.read_bytes()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise UserError(f"{self.reductions} is damaged: remove it, and reductions are timed again")
        return found

    def keep_reduction(self, layout: str, name: str) -> None:
        """Add the reduction ``name``, chosen by time for ``layout``, to reductions.json."""
        self._write(self.reductions, json.dumps(self.read_reductions() | {layout: name}, indent=1) + "\n")

    def mark_done(self, text: str) -> None:
        """Write the file DONE, which says that the run is complete."""
        self._write(self.done, text)

    def is_done(self) -> bool:
        """Return whether the file DONE exists."""
        return self.done.exists()

    def clear_done(self) -> None:
        """Remove the file DONE, because the run goes on."""
        with file_errors(self.done, "remove"):
            self.done.unlink(missing_ok=True)

    def stop_requested(self) -> bool:
        """Return whether the file STOP exists."""
        return self.stop.exists()

    def clear_stop(self) -> None:
        """Remove the file STOP."""
        with file_errors(self.stop, "remove"):
            self.stop.unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> None:
        write_whole(path, lambda descriptor: write_bytes(descriptor, text.encode()))


def finite(value: Any) -> Any:
    """Return ``value`` with every number that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return value


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a text with one JSON object per line."""
    return "".join(json.dumps(finite(row), allow_nan=False) + os.linesep for row in rows)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    with file_errors(path, "read"), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                if line.endswith("\n"):
                    raise UserError(f"{path}: line {number} is not JSON: remove it") from None
                return
            yield row
