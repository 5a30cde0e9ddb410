"""The scripts of jobs/: they parse, and jobs/local.sh does as it says (those for SLURM: make test-slurm)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import QUIET_MPI, finish

from runs import TINY, last_checkpoint, make_dataset

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sh"))
SLOW = ",".join(f"slow:step={step}:seconds=0.15:phase=batch" for step in range(1, 21))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing():
    result = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_slurm_scripts_differ_in_their_launcher_only():
    first, second = ((JOBS / name).read_text() for name in ("slurm-mpirun.sh", "slurm-srun.sh"))
    mark = "# From here on the same text"
    assert mark in first
    assert first.partition(mark)[2] == second.partition(mark)[2]


def start_local(data, run, *arguments, **environment):
    variables = {**os.environ, **QUIET_MPI, "VENV": sys.prefix, "DATA": str(data), "RUN": str(run), "RANKS": "3"}
    return subprocess.Popen(
        [JOBS / "local.sh", *TINY, *arguments],
        env={**variables, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=restore_interrupts,  # noqa: PLW1509  (no threads here)
    )


def restore_interrupts():
    """A shell cannot trap what was ignored when it started, as SIGINT is in a background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_local_stops_by_ctrl_c_and_goes_on(tmp_path):
    data, run = make_dataset(tmp_path), tmp_path / "run"
    process = start_local(data, run, HIERMPI_FAULT=SLOW)
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the script's group
    result = finish(process, 30)
    assert result.returncode == 75, result.stderr
    assert 1 <= last_checkpoint(run).step < 20
    result = finish(start_local(data, run), 30)
    assert result.returncode == 0, result.stderr
    assert (run / "DONE").exists()


def test_local_gives_the_exit_code_of_the_run(tmp_path):
    result = finish(start_local(tmp_path / "missing.h5", tmp_path / "run", "--train.stepz", "5"), 30)
    assert result.returncode == 2, result.stderr
    assert "train.steps" in result.stderr
