"""report: the tables say what the records say, the verdict names what limits a run, the plots are pictures."""

import json

import numpy as np
import pytest

from hiermpi.cli import main
from hiermpi.errors import UserError
from hiermpi.reporting.plots import figures_of, make_plots, smoothed
from hiermpi.reporting.reading import read_run
from hiermpi.reporting.tables import core_use, phase_table, report_text, root_to_worker, straggler_lines, verdict

PHASES = ("batch", "scatter", "compute", "reduce", "optimize", "broadcast", "commit", "evaluate", "checkpoint")


def record(rank, role="worker", group=0, host="a", *, compute=8.0, waiting=1.0, cpu=None, cores=64, **work):
    phases = dict.fromkeys(PHASES, 0.0) | {"compute": compute, "reduce": waiting} | work
    waits = dict.fromkeys(PHASES, 0.0) | {"reduce": waiting}
    busy = {name: phases[name] - waits[name] for name in PHASES} | ({"compute": cpu} if cpu is not None else {})
    return {
        **{"rank": rank, "role": role, "group": group, "host": host, "cores": cores, "elapsed": 10.0},
        **{"first_step": 0, "last_step": 10, "sequences": 40, "tokens": 400},
        **{"phases": phases, "waits": waits, "cpu": busy},
    }


def hierarchy(root=None, **changes):
    """A root, two control ranks and two workers."""
    loads = {"loads": [80, 80, 40], "routed_tokens": 2000, "own_tokens": 1500}
    first = record(0, "root", -1, **(root or {})) | loads
    others = [(1, "control", 0), (2, "worker", 0), (3, "control", 1), (4, "worker", 1)]
    return [first, *(record(*who, **changes) for who in others)]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": s, "loss": 5.0 - s / 10, "tokens": 100, "tokens_per_second": 50.0, "step_seconds": 2.0}
        | {"learning_rate": 1e-3}
        | ({"val_loss": 4.5} if s == 10 else {})
        for s in range(1, 11)
    ]
    rows[3]["loss"] = None
    rows[3]["skipped"] = True
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ranks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in hierarchy()))
    (folder / "config.toml").write_text("[train]\nsteps = 10\nbatch_size = 20\n[model]\nvocab_size = 256\n")
    (folder / "DONE").touch()
    return folder


def test_text(run):
    text = report_text(read_run(run))
    for words in ("step 10 of 10, done", "skipped steps", "validation loss       4.5000", "1 root", "2 controls"):
        assert words in text
    assert "g0 80  g1 80  root 40" in text
    assert "own-group tokens      75.0% (uniform: 50.0%, so 1.5x)" in text


def test_phase_table_shows_work_without_waiting():
    lines = {line[:22].strip(): line[22:].split() for line in phase_table(hierarchy(root={"optimize": 2.0}))}
    assert lines["compute"] == ["8.00"] * 3
    assert lines["optimize"] == ["2.00", "0.00", "0.00"]
    assert lines["waiting"] == ["1.00"] * 3
    assert "reduce" not in lines


def test_ratios():
    records = hierarchy(root={"optimize": 0.5, "cores": 4}, cores=4)
    assert root_to_worker(records) == pytest.approx(8.0 / 0.5)
    assert core_use(records) == (pytest.approx(40 / 40), pytest.approx(40.5 / 40), 4)
    assert root_to_worker(records[:1]) is None


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (hierarchy(root={"waiting": 0.2}, waiting=0.2), "computing, 98%"),
        (hierarchy(root={"cores": 2, "cpu": 4.0}, cores=2, cpu=4.0), "the 2 cores: 5 ranks keep them 100% busy"),
        (hierarchy(root={"optimize": 6.0, "waiting": 0.0}, waiting=6.0), "the root: all wait"),
        (hierarchy(root={"compute": 12.0, "waiting": 0.0}, waiting=4.0), "the slowest (rank 0"),
        (hierarchy(root={"evaluate": 6.0}, evaluate=6.0), "evaluate, 40%"),
    ],
)
def test_verdict(records, words):
    assert words in verdict(records)


def test_stragglers_are_named_by_rank_and_host():
    records = [record(rank, host="ab"[rank % 2]) for rank in range(9)] + [record(9, host="c", compute=20.0)]
    text = "\n".join(straggler_lines(records))
    assert "rank 9 (worker) on c: 500.00 ms, 2.50x the median" in text
    assert "host a" in text
    assert "rank 1 " not in text
    assert straggler_lines(records[:1]) == []


def test_where_ranks_share_cores_nobody_straggles_by_having_started_first():
    first = record(0, compute=16.0, cpu=4.0)
    apart = [first, *(record(rank, host=f"h{rank}", compute=8.0, cpu=4.0) for rank in range(1, 5))]
    assert "rank 0" in "\n".join(straggler_lines(apart))
    shared = {"cores": 2, "cpu": 4.0}
    together = [record(0, compute=16.0, **shared), *(record(rank, compute=8.0, **shared) for rank in range(1, 5))]
    text = "\n".join(straggler_lines(together))
    assert "straggler" not in text
    assert "100.00 to 100.00 ms" in text


def test_plots(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    for name in ("loss", "time", "groups", "tree"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in shown
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "both")]) == 0
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["compare.png"]
    assert main(["report", str(run), "--json", "--no-plots"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["step"], found["best_val_loss"], found["ranks"], found["skipped_steps"]) == (10, 4.5, 5, 1)


def test_what_the_pictures_show(run):
    found = read_run(run)
    figures = figures_of(found)
    bars = figures["groups"].axes[0].patches
    assert [bar.get_height() for bar in bars] == [80, 80, 40]
    widths = sum(patch.get_width() for patch in figures["time"].axes[0].patches)
    assert widths == pytest.approx(3 * 9.0 / 10 * 1e3)  # 9 s in 10 steps, for three roles
    for figure in figures.values():
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel()


def test_a_run_that_was_killed_has_a_report(run, tmp_path):
    (run / "ranks.jsonl").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    assert "no ranks.jsonl" in report_text(read_run(run))
    assert [path.name for path in make_plots([read_run(run)], tmp_path / "plots")] == ["loss.png"]


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("metrics.jsonl", '{"step": "x", "loss": 1.0}\n', "no valid step"),
        ("metrics.jsonl", "[1, 2]\n", "no valid"),
        ("metrics.jsonl", "not json\n", "line 11 is not JSON"),
        ("ranks.jsonl", '{"rank": 1}\n', "no valid role"),
        ("config.toml", "= 1", "not valid TOML"),
    ],
)
def test_broken_files_are_named(run, file, line, words):
    with open(run / file, "a") as out:
        out.write(line)
    with pytest.raises(UserError, match=words):
        read_run(run)


def test_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="name a run folder"):
            read_run(path)


def test_smoothing_keeps_the_mean_of_a_line():
    line = np.linspace(0, 1, 500)
    assert np.allclose(smoothed(line)[10:-10], line[10:-10])
    assert len(smoothed(np.empty(0))) == 0
