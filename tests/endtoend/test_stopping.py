"""Stop a real job from outside, and go on."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from launch import finish, run, start

from runs import TINY, last_checkpoint, make_dataset

OPTIONS = (*TINY, "--model.dropout", "0.1", "--train.steps", "40", "--optimizer.decay_steps", "40")
SLOW = {"HIERMPI_FAULT": ",".join(f"slow:step={step}:seconds=0.15:phase=batch" for step in range(1, 41))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run("train", "--data", data, "--run", folder, *OPTIONS, ranks=3).returncode == 0
    return last_checkpoint(folder)


def stop_by_signal(process, folder):
    process.send_signal(signal.SIGUSR1)  # mpiexec forwards it to every rank


def stop_by_file(process, folder):
    (folder / "STOP").touch()


@pytest.mark.parametrize("stop", [stop_by_signal, stop_by_file])
def test_stop_and_go_on(data, whole, tmp_path, stop):
    folder = tmp_path / "run"
    process = start("train", "--data", data, "--run", folder, *OPTIONS, ranks=3, env=SLOW)
    deadline = time.monotonic() + 30
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 10) and time.monotonic() < deadline:
        time.sleep(0.05)
    stop(process, folder)
    result = finish(process, 30)
    assert result.returncode == 75, result.stderr
    assert "the same command again continues" in result.stdout
    assert not (folder / "DONE").exists()
    assert not (folder / "STOP").exists()
    stopped_at = last_checkpoint(folder).step
    assert 10 <= stopped_at < 40
    result = run("train", "--data", data, "--run", folder, *OPTIONS, ranks=3)
    assert result.returncode == 0, result.stderr
    assert (folder / "DONE").exists()
    after = last_checkpoint(folder)
    for name, tensor in whole.parameters.items():
        assert np.array_equal(after.parameters[name], tensor), name


def test_ctrl_c_on_one_rank_saves(data, tmp_path):
    folder = tmp_path / "run"
    process = start("train", "--data", data, "--run", folder, *OPTIONS, env=SLOW)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    result = finish(process, 30)
    assert result.returncode == 75, result.stderr
    assert last_checkpoint(folder).step >= 1


def test_a_signal_while_the_program_is_loaded_is_not_lost(data, tmp_path):
    process = start("train", "--data", data, "--run", tmp_path / "run", *TINY, "--train.steps", 100_000)
    libraries, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 20
    while "libmpi" not in libraries.read_text() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    result = finish(process)
    assert result.returncode == 75, result.stderr
    assert "stopped by SIGUSR1 after step 1 of" in result.stdout
