"""An error on one rank is an error on all, within seconds, told once."""

import time

import pytest
from launch import run

from hiermpi.errors import UsageError
from hiermpi.training.phases import parse_faults
from runs import TINY, make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("prefix", ["plain", "-m mpi4py"])
@pytest.mark.parametrize(
    ("rank", "phase"),
    [(0, "batch"), (5, "scatter"), (12, "compute"), (3, "reduce"), (0, "optimize"), (7, "broadcast"), (0, "commit")],
)
def test_an_exception_on_one_rank_ends_all(data, tmp_path, rank, phase, prefix):
    if prefix != "plain" and rank != 3:
        pytest.skip("one phase is enough for this way to start")
    fault = {"HIERMPI_FAULT": f"raise:rank={rank}:step=2:phase={phase}"}
    started = time.monotonic()
    words = ("train", "--data", data, "--run", tmp_path / "run", *TINY)
    result = run(*words, ranks=13, env=fault, module=prefix != "plain")
    assert time.monotonic() - started < 25  # ten seconds after the fault; start-up of 13 ranks comes before it
    assert result.returncode == 1, result.stderr
    told = [line for line in result.stderr.splitlines() if "fault injected" in line]
    assert len(told) == 1, result.stderr
    assert f"rank {rank} on " in told[0]
    assert f"in phase {phase}" in told[0]
    assert "Traceback" not in result.stderr
    assert "Traceback" in (tmp_path / "run" / "errors" / f"rank-{rank:04d}.txt").read_text()


@pytest.mark.parametrize("kind", ["kill", "exit"])
def test_a_dead_rank_ends_the_job(data, tmp_path, kind):
    fault = {"HIERMPI_FAULT": f"{kind}:rank=2:step=3:phase=reduce"}
    options = (*TINY, "--checkpoint.interval", "2", "--checkpoint.asynchronous", "false")
    words = ("train", "--data", data, "--run", tmp_path / "run", *options)
    assert run(*words, ranks=4, env=fault).returncode not in (0, 75)
    assert not (tmp_path / "run" / "DONE").exists()
    result = run(*words, ranks=4)
    assert result.returncode == 0, result.stderr
    assert "after step 2 of 20" in result.stderr
    assert (tmp_path / "run" / "DONE").exists()


def test_a_hanging_rank_ends_the_job(data, tmp_path):
    fault = {"HIERMPI_FAULT": "hang:rank=1:step=2:phase=compute"}
    options = (*TINY, "--run.stall_warn", "1", "--run.stall_abort", "2")
    result = run("train", "--data", data, "--run", tmp_path / "run", *options, ranks=3, env=fault, timeout=40)
    assert result.returncode == 1
    assert "has waited" in result.stderr
    assert "run.stall_abort" in result.stderr


def test_ten_skipped_steps_end_the_run(data, tmp_path):
    fault = {"HIERMPI_FAULT": ",".join(f"nan:rank=1:step={step}" for step in range(1, 11))}
    result = run("train", "--data", data, "--run", tmp_path / "run", *TINY, ranks=3, env=fault)
    assert result.returncode == 1
    assert "10 steps in a row" in result.stderr
    assert "step 1 skipped, not finite: rank 1: wte.weight" in result.stderr
    assert "Traceback" not in result.stderr


def test_faults_are_parsed_strictly():
    faults = parse_faults({"HIERMPI_FAULT": "kill:rank=4:step=7:phase=reduce,nan:tensor=2"})
    assert [(fault.kind, fault.rank, fault.step, fault.phase) for fault in faults] == [
        ("kill", 4, 7, "reduce"),
        ("nan", 0, 1, "compute"),
    ]
    for text in ("melt", "kill:rank=x", "kill:colour=3", "kill:rank", "kill:phase=lunch"):
        with pytest.raises(UsageError, match="KIND:rank=R"):
            parse_faults({"HIERMPI_FAULT": text})
