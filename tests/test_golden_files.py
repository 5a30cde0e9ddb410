"""Files of earlier versions, made by tests/golden/make.sh: whole, told, evaluated, continued to the same parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hiermpi.cli import main
from hiermpi.kernels import available_levels, using_kernels
from hiermpi.reporting.reading import inspect
from hiermpi.storage.checkpoint import load_checkpoint, parameters_digest
from hiermpi.training.evaluation import evaluate
from runs import last_checkpoint, train_on

GOLDEN = Path(__file__).parent / "golden"
DATA = GOLDEN / "data.h5"
MODES = ("false", "true")
SETTINGS = (
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.context_length", "16"),
    *("--train.batch_size", "8", "--train.micro_batch_size", "2", "--train.steps", "10", "--train.eval_interval", "0"),
    *("--train.eval_batches", "4", "--optimizer.warmup_steps", "2", "--optimizer.decay_steps", "10"),
    *("--lattice.coupling", "1e-4"),
)
LEVELS = ("numpy", *available_levels())


def golden(mode, step):
    return GOLDEN / f"reproducible-{mode}-{step:02}.h5"


def test_they_are_whole(capsys):
    files = sorted(GOLDEN.glob("*.h5"))
    assert len(files) == 5
    assert main(["verify", *map(str, files)]) == 0
    assert capsys.readouterr().out.count(": whole (") == 5


def test_they_are_told():
    assert inspect(DATA)["tokens"]["val"] > 0
    found = inspect(golden("true", 5))
    assert found["step"] == 5
    assert found["parameters"] == sum(t.size for t in load_checkpoint(golden("true", 5)).parameters.values())


@pytest.mark.parametrize("mode", MODES)
def test_the_optimizer_state_comes_by_name(mode):
    state = load_checkpoint(golden(mode, 5)).state
    assert set(state) == {"m", "v"}
    assert all(np.abs(tensor).sum() > 0 for tensors in state.values() for tensor in tensors.values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_they_are_evaluated_alike(mode, level):
    known = json.loads((GOLDEN / f"reproducible-{mode}.json").read_text())
    with using_kernels(level):
        found = evaluate(golden(mode, 10), DATA)
    assert found["tokens"] == known["tokens"]
    assert found["loss"] == pytest.approx(known["loss"], rel=1e-12 if level == "plain" else 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [0, 5])
def test_they_are_continued(tmp_path, mode, level, start):
    resume = str(golden(mode, 5)) if start else "none"
    settings = (*SETTINGS, "--hierarchy.reproducible", mode, "--resume", resume)
    with using_kernels(level):
        assert train_on(MPI.COMM_SELF, DATA, tmp_path / "run", *settings) == 0
    ours, theirs = last_checkpoint(tmp_path / "run"), load_checkpoint(golden(mode, 10))
    assert ours.step == theirs.step == 10
    if level == "plain":
        assert parameters_digest(ours) == parameters_digest(theirs)
    for name, tensor in theirs.parameters.items():
        assert np.allclose(ours.parameters[name], tensor, rtol=0, atol=2e-5), name
