"""plan's memory against what Linux says of a real run."""

import json
import time
from pathlib import Path

from launch import finish, run, start

from runs import make_dataset

SHAPE = ("--model.n_embd", "256", "--model.n_layer", "6", "--train.batch_size", "9", "--train.eval_interval", "0")


def proportional_set_size(folder):
    """{rank: bytes} of the ranks that train into ``folder``."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            variables = dict(v.split("=", 1) for v in (process / "environ").read_text().split("\0") if "=" in v)
            if str(folder) in words and "python" in words[0] and "OMPI_COMM_WORLD_RANK" in variables:
                lines = (process / "smaps_rollup").read_text().splitlines()
                size = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                found[int(variables["OMPI_COMM_WORLD_RANK"])] = 1024 * size
        except (OSError, StopIteration):
            continue
    return found


def test_plan_says_what_a_run_takes(tmp_path):
    data = make_dataset(tmp_path)
    folder = tmp_path / "run"
    process = start("train", "--data", data, "--run", folder, *SHAPE, "--train.steps", 10_000, ranks=3)
    try:
        metrics = folder / "metrics.jsonl"
        deadline = time.monotonic() + 40
        while (not metrics.exists() or metrics.read_text().count("\n") < 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        measured = proportional_set_size(folder)
    finally:
        (folder / "STOP").touch()
        assert finish(process).returncode == 75
    planned = json.loads(run("plan", "--ranks", 3, "--data", data, "--json", *SHAPE).stdout)["memory_bytes"]
    assert len(measured) == 3
    for rank, name in ((0, "root"), (1, "control"), (2, "control")):
        assert abs(planned[name] / measured[rank] - 1) < 0.1, (rank, planned[name], measured[rank])
    assert abs(planned["node"] / sum(measured.values()) - 1) < 0.1
