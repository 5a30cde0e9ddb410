"""The content of files is read here: a dataset, a checkpoint, and the run folder in numbers."""

import json
import math
import statistics
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.errors import UserError
from hiermpi.files import file_errors
from hiermpi.storage.checkpoint import Checkpoint, load_checkpoint, parameters_digest
from hiermpi.storage.container import kind_of
from hiermpi.storage.dataset import SPLITS, TokenDataset, open_dataset
from hiermpi.storage.run_folder import RunFolder

LAST_STEPS = 20
"""The number of last steps over which the final training loss and speed are averaged."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder; rows and records without a required field are refused."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    """The records of the ranks of the last start; the list is empty where the run has not ended in order."""
    done: bool

    @property
    def name(self) -> str:
        """The name of the run's folder, or its path where that has no name."""
        return self.path.name or str(self.path)

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """The pairs (step, training loss) of the steps that were not skipped."""
        return [(row["step"], row["loss"]) for row in self.metrics if row["loss"] is not None]

    @cached_property
    def validations(self) -> list[tuple[int, float]]:
        """The pairs (step, validation loss)."""
        return [(row["step"], row["val_loss"]) for row in self.metrics if row.get("val_loss") is not None]

    @property
    def root(self) -> dict[str, Any] | None:
        """The root's record, or None where there is none."""
        return next((record for record in self.ranks if record["role"] == "root"), None)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The records of the ranks that computed: the workers; without any, the control ranks; or else the root."""
        computing = [record for record in self.ranks if record["sequences"]]
        below = [record for record in computing if record["role"] == "worker"]
        return below or [record for record in computing if record["role"] == "control"] or computing

    def summary(self) -> dict[str, Any]:
        """Return the main figures as plain data."""
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
    """Read the run in folder ``path``. Raises UserError."""
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
    """Refuse a row that lacks one of these fields.

    Args:
        row: The row of a file.
        fields: The types of the required fields by name.
        folder: The run folder, for the message.

    Raises:
        UserError: The row is not whole.
    """
    for name, kinds in fields.items():
        if not isinstance(row, dict) or name not in row or not isinstance(row[name], kinds):
            raise UserError(f"{folder.path}: a line of metrics.jsonl or ranks.jsonl has no valid {name}: remove it")


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.toml as ``{"section.field": value}``, empty where it is missing. Raises UserError."""
    if not path.exists():
        return {}
    with file_errors(path, "read"):
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


SAMPLE_TOKENS = 200
MOST_FREQUENT = 12


def inspect(path: Path) -> dict[str, Any]:
    """Describe the content of a file, or of the newest checkpoint of a run folder. Raises UserError."""
    if path.is_dir():
        return inspect_checkpoint(*RunFolder(path).newest_checkpoint())
    if kind_of(path) == "dataset":
        dataset = open_dataset(path)
        try:
            return inspect_dataset(dataset)
        finally:
            dataset.close()
    return inspect_checkpoint(path, load_checkpoint(path, with_state=False))


def inspect_dataset(dataset: TokenDataset) -> dict[str, Any]:
    """Describe a dataset as plain data."""
    tokenizer = tokenizer_from_json(dataset.tokenizer)
    length = min(SAMPLE_TOKENS, dataset.length("train"))
    sample = tokenizer.decode(dataset.read("train", np.array([0]), length)[0]).decode("utf-8", "replace")
    groups = np.bincount(dataset.symmetry_group, weights=dataset.counts, minlength=dataset.symmetry_order)
    total = max(float(groups.sum()), 1.0)
    frequent = np.argsort(-dataset.counts, kind="stable")[:MOST_FREQUENT]
    tokens = {split: dataset.length(split) for split in SPLITS}
    n_bytes = {"train": dataset.train_bytes, "val": dataset.val_bytes}
    return {
        "kind": "dataset",
        "file": str(dataset.path),
        "sha256": dataset.sha256,
        "tokenizer": tokenizer.kind,
        "vocab_size": dataset.vocab_size,
        "unused_tokens": int((dataset.counts == 0).sum()),
        "symmetry_order": dataset.symmetry_order,
        "sources": sources_of(dataset),
        "tokens": tokens,
        "bytes": n_bytes,
        "bytes_per_token": sum(n_bytes.values()) / max(sum(tokens.values()), 1),
        "group_share": [float(weight) / total for weight in groups],
        "frequent": [
            {"id": int(i), "text": tokenizer.decode([int(i)]).decode("utf-8", "replace"), "count": int(c)}
            for i, c in zip(frequent, dataset.counts[frequent], strict=True)
        ],
        "sample": sample,
    }


def inspect_checkpoint(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint as plain data."""
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    return {
        "kind": "checkpoint",
        "file": str(path),
        "step": checkpoint.step,
        "loss": checkpoint.loss if math.isfinite(checkpoint.loss) else None,
        "skipped_steps": checkpoint.skipped_steps,
        "sequences_drawn": checkpoint.cursor,
        "seed": checkpoint.seed,
        "parameters": sum(tensor.size for tensor in checkpoint.parameters.values()),
        "parameters_sha256": parameters_digest(checkpoint),
        "dataset_sha256": checkpoint.dataset_sha256,
        "tokenizer": tokenizer.kind,
        "config": checkpoint.config,
        "tensors": {
            name: {"shape": list(tensor.shape), "rms": float(np.sqrt(np.mean(np.square(tensor, dtype=np.float64))))}
            for name, tensor in checkpoint.parameters.items()
        },
    }


def describe(found: dict[str, Any]) -> str:
    """Write the result of :func:`inspect` as a text for a person."""
    return "\n".join(describe_dataset(found) if found["kind"] == "dataset" else describe_checkpoint(found))


def describe_dataset(found: dict[str, Any]) -> list[str]:
    """Write the lines about a dataset."""
    tokens, n_bytes, shares = found["tokens"], found["bytes"], found["group_share"]
    return [
        f"{'dataset':16}{found['file']}",
        f"{'SHA-256':16}{found['sha256']}",
        f"{'sources':16}{', '.join(found['sources'])}",
        f"{'text':16}{n_bytes['train']:,} bytes for training, {n_bytes['val']:,} for validation",
        f"{'tokens':16}{tokens['train']:,} for training, {tokens['val']:,} for validation",
        f"{'tokenizer':16}{found['tokenizer']}, {found['vocab_size']:,} tokens "
        f"({found['unused_tokens']:,} never used), {found['bytes_per_token']:.2f} bytes per token",
        "",
        f"share of the corpus by symmetry group (even: {1 / len(shares):.1%})",
        *(f"{f'group {index}':16}{share:6.1%}  {bar(share, max(shares))}" for index, share in enumerate(shares)),
        "",
        "most frequent    " + "  ".join(f"{entry['text']!r} {entry['count']:,}" for entry in found["frequent"]),
        "",
        "how it begins",
        *(f"    {line}" for line in printable(found["sample"]).splitlines()),
    ]


def describe_checkpoint(found: dict[str, Any]) -> list[str]:
    """Write the lines about a checkpoint."""
    loss = "not known" if found["loss"] is None else f"{found['loss']:.4f} nats"
    skipped = f" ({found['skipped_steps']} skipped)" if found["skipped_steps"] else ""
    lines = [
        f"{'checkpoint':16}{found['file']}",
        f"{'step':16}{found['step']:,}{skipped}",
        f"{'training loss':16}{loss}",
        f"{'parameters':16}{found['parameters']:,}",
        f"{'their SHA-256':16}{found['parameters_sha256']}",
        f"{'data SHA-256':16}{found['dataset_sha256'] or 'none (imported)'}",
        f"{'tokenizer':16}{found['tokenizer']}",
        "",
    ]
    section = ""
    for name, value in found["config"].items():
        here, _, key = name.partition(".")
        if here != section:
            section = here
            lines.append(f"[{section}]")
        shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
        lines.append(f"{key} = {shown}")
    lines += ["", f"{'tensor':32}{'shape':>16}{'rms':>12}"]
    for name, tensor in found["tensors"].items():
        shape = " x ".join(map(str, tensor["shape"]))
        lines.append(f"{name:32}{shape:>16}{tensor['rms']:12.4g}")
    return lines


def sources_of(dataset: TokenDataset) -> list[str]:
    """Return the names of the sources of a dataset."""
    try:
        found = json.loads(dataset.sources)
    except (ValueError, RecursionError):
        found = []
    return [printable(str(source)) for source in found] if isinstance(found, list) else []


def printable(text: str) -> str:
    """Return ``text`` without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def bar(value: float, largest: float, width: int = 40) -> str:
    """Draw a bar of text, which is ``width`` characters long at ``largest``.

    Args:
        value: The value to draw.
        largest: The value of a full bar.
        width: The length of a full bar in characters.
    """
    return "█" * round(width * value / largest) if largest > 0 else ""
