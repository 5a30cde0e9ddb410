"""Runs with plug-ins: small, launched as a user launches them, in the folder where the plug-ins are."""

import json
from pathlib import Path

import launch

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 24,
    "model.context_length": 16,
    "train.batch_size": 26,
    "train.steps": 6,
    "train.eval_interval": 0,
    "train.eval_batches": 1,
    "train.micro_batch_size": 1,
    "train.log_interval": 100,
    "optimizer.decay_steps": 6,
    "optimizer.warmup_steps": 2,
}
"""Settings of a run of less than a second of work."""
TEXT = "".join(
    f"def function_{i}(x, y={i}):\n    return [x + {i % 7} * y for _ in range({i % 13})]\n\n" for i in range(300)
)


def make_dataset(folder):
    """Prepare a small dataset in ``folder``; return its path."""
    import hiermpi

    (folder / "text.txt").write_text(TEXT)
    return hiermpi.prepare(str(folder / "text.txt"), folder / "data.h5").path


def run(*arguments, ranks=0, cwd=REPOSITORY, timeout=60):
    """Run a command in the folder ``cwd``."""
    return launch.run(*arguments, ranks=ranks, cwd=cwd, timeout=timeout)


def train(data, folder, settings=None, ranks=0, cwd=REPOSITORY, timeout=60):
    """Run ``hiermpi train`` with small settings and these."""
    flags = [word for name, value in {**SMALL, **(settings or {})}.items() for word in (f"--{name}", value)]
    return run("train", "--data", data, "--run", folder, *flags, ranks=ranks, cwd=cwd, timeout=timeout)


def trained(*arguments, **keywords):
    """Do what :func:`train` does, which must succeed; return the run folder."""
    result = train(*arguments, **keywords)
    assert result.returncode == 0, result.stderr
    return arguments[1]


def losses(folder):
    """Return the losses of a run, in the order of the steps."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def require_one_sentence(result, code, *words):
    """Require exit ``code`` and one line of hiermpi's that holds ``words``; the launcher's banner is not ours."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = map(str.strip, result.stderr.splitlines())
    ours = [line for line in lines if line.startswith("hiermpi: ") and "warning: " not in line]
    assert len(ours) == 1, result.stderr
    for word in words:
        assert word in ours[0], ours[0]
