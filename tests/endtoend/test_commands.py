"""The commands as a user types them."""

import json
import subprocess
import sys

import pytest
from launch import environment, run

from hiermpi.cli import COMMANDS
from runs import TINY, make_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = make_dataset(folder)
    result = run("train", "--data", data, "--run", folder / "run", *TINY, ranks=4)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_train_tells_what_happened(trained):
    folder, result = trained
    for words in ("done after step 20 of 20", "validation", "seconds of work", "sequences", "hiermpi evaluate"):
        assert words in result.stdout
    assert "tokens/s" in result.stderr
    run_folder = folder / "run"
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    expected = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "phases"}
    assert expected <= rows[0].keys()
    assert "val_loss" in rows[-1]
    ranks = [json.loads(line) for line in (run_folder / "ranks.jsonl").read_text().splitlines()]
    assert [entry["role"] for entry in ranks] == ["root", "control", "control", "control"]
    assert sum(entry["sequences"] for entry in ranks) == 20 * 24
    assert (run_folder / "DONE").exists()
    assert "n_embd = 48" in (run_folder / "config.toml").read_text()


def test_evaluate_agrees_on_any_number_of_ranks(trained):
    folder, _ = trained
    results = [
        json.loads(run("evaluate", folder / "run", "--data", folder / "data.h5", "--json", ranks=ranks).stdout)
        for ranks in (0, 1, 3)
    ]
    assert set(results[0]) == {"split", "loss", "perplexity", "bits_per_byte", "tokens"}
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


def test_generate_writes_text(trained):
    folder, _ = trained
    words = ("generate", folder / "run", "--prompt", "def f", "--tokens", 20)
    first, again = run(*words), run(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def f")
    assert first.stdout == again.stdout
    assert run(*words, "--seed", 1).stdout != first.stdout
    refused = run("generate", folder / "run", "--prompt", "")
    assert refused.returncode == 2
    assert "--prompt is empty" in refused.stderr


def test_verify_and_version(trained):
    folder, _ = trained
    checkpoint = folder / "run" / "checkpoints" / "step-00000020.h5"
    assert run("verify", folder / "data.h5", checkpoint).returncode == 0
    bad = folder / "bad.h5"
    content = bytearray(checkpoint.read_bytes())
    content[-5] ^= 4
    bad.write_bytes(content)
    result = run("verify", checkpoint, bad)
    assert result.returncode == 1
    assert "bad.h5" in result.stdout + result.stderr
    assert run("--version").stdout.startswith("hiermpi ")


def without_mpi4py(*arguments):
    """Run hiermpi where importing mpi4py fails, as on a login node."""
    blocked = "import sys; sys.modules['mpi4py'] = None; from hiermpi.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", blocked, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_digests_are_compared(trained, tmp_path):
    folder, _ = trained
    run_folder, file = folder / "run", next((folder / "run" / "checkpoints").glob("*.h5"))
    same = run("verify", run_folder, file, "--digest")
    assert same.returncode == 0
    assert "the same parameters" in same.stdout
    other = run("train", "--data", folder / "data.h5", "--run", tmp_path / "r", *TINY, "--train.steps", 3)
    assert other.returncode == 0
    different = run("verify", run_folder, tmp_path / "r", "--digest")
    assert different.returncode == 1
    assert "different parameters, at different steps" in different.stdout
    assert run("verify", run_folder).returncode == 0


@pytest.mark.parametrize("ranks", [1, 2, 13, 14, 64, 1000, 4096])
def test_plan_answers_without_mpi(ranks):
    result = without_mpi4py("plan", "--ranks", ranks, "--json")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["ranks"] == ranks
    assert (planned["roots"], planned["controls"]) == (1, min(12, ranks - 1))
    assert planned["workers"] == max(0, ranks - 13)
    text = without_mpi4py("plan", "--ranks", ranks)
    assert text.returncode == 0
    assert "1 root" in text.stdout


def test_help_and_commands_of_one_process_work_without_mpi(trained):
    folder, _ = trained
    for command in COMMANDS:
        result = without_mpi4py(command, "--help")
        assert result.returncode == 0, result.stderr
        assert "example:" in result.stdout
    assert without_mpi4py("--help").returncode == 0
    assert without_mpi4py("verify", folder / "data.h5").returncode == 0
    assert without_mpi4py("evaluate", folder / "run", "--data", folder / "data.h5").returncode == 0


def test_info_tells_the_library():
    result = run("info")
    assert result.returncode == 0
    for word in ("MPI", "BLAS", "HDF5", "cores"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("what", "ranks", "options", "methods"),
    [
        ("kernels", 0, (), {"norm_forward nano numpy"}),
        ("reduce", 3, (*TINY, "--largest", 1000), {"tree", "shared", "flat", "auto", "Allreduce", "Reduce + Bcast"}),
        ("step", 2, (*TINY, "--peer", "none"), {"hiermpi", "sgemm"}),
    ],
)
def test_bench_measures(what, ranks, options, methods, tmp_path):
    kept = {"XDG_CONFIG_HOME": str(tmp_path)}
    result = run("bench", what, "--rounds", 2, "--json", *options, ranks=ranks, env=kept)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert methods <= {entry["method"] for entry in measured["rows"]}
    for entry in measured["rows"]:
        assert {"method", "ranks", "n", "median_s", "q1_s", "q3_s"} <= entry.keys()
        assert 0 < entry["q1_s"] <= entry["median_s"] <= entry["q3_s"]
    assert measured["ratios"]
    if what == "reduce":
        planned = json.loads(run("plan", "--ranks", 2, "--json", *TINY, env=kept).stdout)
        assert planned["prediction"]["step_seconds"] > 0
        assert planned["prediction"]["machine"]["ranks"] == 3


def test_help_under_mpiexec_is_printed_once():
    result = run("train", "--help", ranks=3)
    assert result.returncode == 0
    assert result.stdout.count("example:") == 1
