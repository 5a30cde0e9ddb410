"""Small datasets and training runs for tests, inside the process or on the ranks of a test."""

import os
from unittest import mock

from hiermpi.cli import parse
from hiermpi.storage.run_folder import RunFolder

TINY = (
    *("--model.n_layer", "2", "--model.n_head", "4", "--model.n_embd", "48", "--model.context_length", "32"),
    *("--train.batch_size", "24", "--train.steps", "20", "--train.eval_interval", "0", "--train.eval_batches", "1"),
    *("--optimizer.decay_steps", "20", "--optimizer.warmup_steps", "4"),
)
"""Settings of the runs that every rank count must agree on."""

TEXT = "".join(
    f"def function_{i}(x, y={i}):\n    return [x + {i % 7} * y for _ in range({i % 13})]\n\n" for i in range(600)
)


def make_dataset(folder, text=TEXT, *options):
    """A dataset of ``text`` by bytes in ``folder``; its path."""
    source = folder / "text.txt"
    source.write_text(text)
    out = folder / "data.h5"
    arguments = parse(["prepare", str(source), "--out", str(out), *options])
    from hiermpi.commands.files import run_prepare

    assert run_prepare(arguments) == 0
    return out


def train_on(comm, data, run, *options, environment=None):
    """``hiermpi train`` on the ranks of ``comm``; its exit code. Collective over ``comm``."""
    from hiermpi.commands.train import train_together

    arguments = parse(["train", "--data", str(data), "--run", str(run), *map(str, options)])
    with mock.patch.dict(os.environ, environment or {}):
        return train_together(arguments, comm)


def losses(run):
    """Losses by step."""
    return [row["loss"] for row in RunFolder(run).read_metrics()]


def last_checkpoint(run):
    """The newest checkpoint of a run."""
    found = RunFolder(run).checkpoints.newest_valid()
    assert found is not None, f"{run} holds no checkpoint"
    _, checkpoint = found
    return checkpoint


