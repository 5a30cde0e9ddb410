"""The scripts of jobs/ under a private SLURM, as a user submits them."""

import collections
import json
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from launch import QUIET_MPI
from private_slurm import Cluster, wait_until

from hiermpi.storage.checkpoint import load_checkpoint
from runs import TINY, make_dataset

ROOT = Path(__file__).resolve().parents[2]
SRUN = ROOT / "jobs" / "slurm-srun.sh"
MPIRUN = ROOT / "jobs" / "slurm-mpirun.sh"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", "--time=10")
OPTIONS = (*TINY, "--model.dropout", "0.1")
SLOW = ",".join(f"slow:step={step}:seconds=0.15:phase=batch" for step in range(1, 15))


@pytest.fixture(scope="module")
def cluster():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends the tests, the daemons go
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def submit(cluster, data, tmp_path):
    """Submit a script to train in a run folder of its own; the job's number and the run folder."""

    def submit(script, *options, arguments=OPTIONS, **environment):
        run = tmp_path / "run"
        variables = {**QUIET_MPI, "VENV": str(Path(sys.prefix)), "DATA": str(data), "RUN": str(run), **environment}
        output = f"--output={tmp_path}/%x-%j.out"
        return cluster.submit(script, output, *options, environment=variables, arguments=arguments), run

    yield submit
    for file in tmp_path.glob("*.out"):
        print(file.read_text())  # shown where the test fails


def hosts(run):
    """Number of ranks by host."""
    return collections.Counter(json.loads(line)["host"] for line in (run / "ranks.jsonl").read_text().splitlines())


def parameters(run):
    """Of the newest checkpoint."""
    return load_checkpoint(max((run / "checkpoints").glob("step-*.h5"))).parameters


def assert_same(run, expected):
    found = parameters(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name


def steps_done(run):
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_srun_on_four_nodes(cluster, submit):
    job, run = submit(SRUN, "--nodes=4", "--ntasks-per-node=2", "--time=10")
    assert cluster.finish(job)["JobState"] == "COMPLETED"
    assert (run / "DONE").exists()
    assert hosts(run) == dict.fromkeys(cluster.names, 2)


@pytest.fixture(scope="module")
def whole(cluster, data, tmp_path_factory):
    """A run that nobody stops: its parameters, ranks by host, and job."""
    folder = tmp_path_factory.mktemp("whole")
    variables = {**QUIET_MPI, "VENV": sys.prefix, "DATA": str(data), "RUN": str(folder / "run")}
    job = cluster.submit(MPIRUN, f"--output={folder}/out", *TWO_NODES, environment=variables, arguments=OPTIONS)
    state = cluster.finish(job)["JobState"]
    assert state == "COMPLETED", (folder / "out").read_text()
    return folder / "run"


def test_mpirun_on_two_nodes(whole):
    assert (whole / "DONE").exists()
    assert sorted(hosts(whole).values()) == [2, 2]


@pytest.mark.parametrize("script", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_stop_requeue_and_go_on_bit_for_bit(cluster, submit, whole, script):
    job, run = submit(script, *TWO_NODES, HIERMPI_FAULT=SLOW)
    wait_until(lambda: steps_done(run) >= 3, 30, "three steps")
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_for(job, "PENDING")
    stopped_at = max((run / "checkpoints").glob("step-*.h5")).name
    assert not (run / "DONE").exists()
    assert "step-00000003.h5" <= stopped_at < "step-00000020.h5"
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert (run / "DONE").exists()
    assert_same(run, parameters(whole))


def test_a_wrong_command_line_is_not_requeued(cluster, submit):
    job, _ = submit(MPIRUN, *TWO_NODES, arguments=("--train.stepz", "5"))
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")


def test_tasks_of_an_array_go_their_own_way(cluster, submit):
    array, run = submit(SRUN, *TWO_NODES, "--array=0-1", FLAGS="--train.seed 7%a", HIERMPI_FAULT=SLOW)
    folders = [Path(f"{run}-{task}") for task in range(2)]
    wait_until(lambda: steps_done(folders[1]) >= 3, 30, "three steps")
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{array}_1")  # the task whose job number is the array's
    for task, restarts in enumerate("01"):
        ended = cluster.finish(f"{array}_{task}")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts)
        assert (folders[task] / "DONE").exists()
        assert f"seed = 7{task}" in (folders[task] / "config.toml").read_text()
    assert not run.exists()


def test_scancel_ends_the_job(cluster, submit):
    job, run = submit(MPIRUN, *TWO_NODES, HIERMPI_FAULT=SLOW)
    wait_until(lambda: steps_done(run) >= 3, 30, "three steps")
    cluster.ask("scancel", job)
    wait_until(lambda: not cluster.ask("squeue", "--noheader", "--jobs", job), 20, "the job is out of the queue")
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_lost_node_requeues_the_job(cluster, submit, whole):
    job, run = submit(MPIRUN, *TWO_NODES, arguments=(*OPTIONS, "--checkpoint.interval", "2"), HIERMPI_FAULT=SLOW)
    wait_until(lambda: steps_done(run) >= 3, 30, "three steps")
    first, second = cluster.ask("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    assert cluster.job(job)["BatchHost"] == first
    cluster.lose(second)  # mpirun ends with 0
    try:
        wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", 30, "the script has requeued the job")
        cluster.ask("scontrol", "update", f"NodeName={second}", "State=DOWN", "Reason=lost")  # SLURM: after a while
        ended = cluster.finish(job)
    finally:
        cluster.boot(second)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert second not in hosts(run)
    assert_same(run, parameters(whole))
