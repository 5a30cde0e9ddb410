"""A rank killed halfway through its update leaves the others a whole state: that of the last committed step."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import BIN, environment, finish, run

from runs import TINY, last_checkpoint, make_dataset

STEP = 4
RANKS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["shared", "tree"])
def undisturbed(request, data, tmp_path_factory):
    """(reduction, what a run that ends before step :data:`STEP` saves)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ("train", "--data", data, "--run", folder, *TINY, "--hierarchy.reduction", request.param)
    result = run(*words, "--train.steps", STEP - 1, ranks=RANKS)
    assert result.returncode == 0, result.stderr
    saved = last_checkpoint(folder)
    parts = {"parameters": saved.parameters, **saved.state}
    return request.param, {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def states_after_a_death(data, folder, victim, *settings):
    """What the survivors of a kill in the update of step :data:`STEP` hold, by rank."""
    program = [sys.executable, "-m", "mpi4py", str(Path(__file__).parents[1] / "survivors.py")]
    words = [str(BIN / "mpiexec"), "--with-ft", "ulfm", "-n", str(RANKS), *program]
    words += map(str, [data, folder, victim, STEP, *TINY, *settings])
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words, env=environment(), text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )
    result = finish(process)
    found = {int(path.stem.split("-")[1]): dict(np.load(path)) for path in folder.glob("rank-*.npz")}
    assert sorted(found) == [rank for rank in range(RANKS) if rank != victim], result.stderr
    assert all(state.pop("step") == STEP - 1 for state in found.values())
    return found


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_hold_the_last_committed_step(data, undisturbed, tmp_path, victim):
    reduction, expected = undisturbed
    settings = ("--hierarchy.reduction", reduction, "--run.on_failure", "shrink")
    for rank, state in states_after_a_death(data, tmp_path, victim, *settings).items():
        known = expected if reduction == "shared" else [name for name in expected if name.startswith("parameters")]
        assert state.keys() == set(known)
        assert [name for name in state if not np.array_equal(state[name], expected[name])] == [], f"rank {rank}"


def test_with_one_slot_they_hold_half_an_update(data, undisturbed, tmp_path):
    reduction, expected = undisturbed
    if reduction != "shared":
        pytest.skip("with messages the parameters of others are never half-updated")
    for state in states_after_a_death(data, tmp_path, 2, "--hierarchy.reduction", reduction).values():
        assert [name for name in state if not np.array_equal(state[name], expected[name])]
