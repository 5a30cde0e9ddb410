"""A rank that fails inside its compute slot, which the others wait for, ends the job."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import BIN, environment, finish

from hiermpi.kernels.gates import can_sleep
from hiermpi.storage.run_folder import RunFolder
from runs import TINY, make_dataset

pytestmark = [
    pytest.mark.skipif(not can_sleep(), reason="gates.c was not built"),
    pytest.mark.timeout(240),
]
PROGRAM = Path(__file__).parents[1] / "in_a_slot.py"
RANKS = 4
FAILING = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def run(data, folder, fault, *settings, timeout=60):
    """Train on ranks of one core, of which one has ``fault``; its end, and what it noted."""
    notes = folder / "notes"
    notes.mkdir()
    words = [BIN / "mpiexec", "-n", RANKS, sys.executable, PROGRAM, fault, FAILING, notes]
    words += ["train", "--data", data, "--run", folder / "run", *TINY, *settings]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        list(map(str, words)), env=environment(), text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )
    return finish(process, timeout)


def notes_of(folder):
    return {path.name: path.read_text() for path in (folder / "notes").iterdir()}


def ranks_in(folder):
    """The processes that have ``folder`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended in the meantime
            continue
        if str(folder / "run").encode() in words:
            found.append(int(path.parent.name))
    return found


def require_it_failed_in_the_slot(folder):
    """Require that the rank failed with the only slot of the node in its hands, and that the run did not end well."""
    assert notes_of(folder)["failed.txt"] == "0"
    assert not (folder / "run" / "DONE").exists()
    assert len(RunFolder(folder / "run").read_metrics()) < 20


def test_all_ranks_take_turns_in_one_slot(data, tmp_path):
    """Without a fault the same program trains to the end, so that the other tests see the fault and nothing else."""
    result = run(data, tmp_path, "none")
    assert result.returncode == 0, result.stderr
    found = notes_of(tmp_path)
    assert found.pop("failed.txt") == "0"  # it has come to the place where the others fail
    assert found == {f"rank-{rank}.txt": "0" for rank in range(RANKS)}
    assert (tmp_path / "run" / "DONE").exists()


def test_a_rank_that_raises_in_its_slot_ends_the_job(data, tmp_path):
    result = run(data, tmp_path, "raise")
    assert result.returncode == 1, result.stderr
    require_it_failed_in_the_slot(tmp_path)
    told = [line for line in result.stderr.splitlines() if "failed in a slot" in line]
    assert len(told) == 1, result.stderr
    assert f"rank {FAILING} on " in told[0]
    assert "Traceback" not in result.stderr
    assert "Traceback" in (tmp_path / "run" / "errors" / f"rank-{FAILING:04d}.txt").read_text()


def test_a_rank_that_dies_in_its_slot_ends_the_job(data, tmp_path):
    result = run(data, tmp_path, "die")
    assert result.returncode not in (0, 75), result.stderr
    require_it_failed_in_the_slot(tmp_path)


def test_a_rank_that_hangs_in_its_slot_ends_the_job(data, tmp_path):
    result = run(data, tmp_path, "hang", "--run.stall_warn", "1", "--run.stall_abort", "2")
    assert result.returncode == 1, result.stderr
    require_it_failed_in_the_slot(tmp_path)
    assert "run.stall_abort" in result.stderr


def test_without_a_limit_the_others_wait_for_the_slot(data, tmp_path):
    """This is what the limit is for: the hang is real, and it is nothing else that ended the job of the test before."""
    with pytest.raises(AssertionError, match="still running after 15 s"):
        run(data, tmp_path, "hang", "--run.stall_warn", "1", "--run.stall_abort", "0", timeout=15)
    require_it_failed_in_the_slot(tmp_path)
    limit = time.monotonic() + 10
    while ranks_in(tmp_path) and time.monotonic() < limit:  # mpiexec may end a little before its ranks
        time.sleep(0.1)
    assert ranks_in(tmp_path) == []
