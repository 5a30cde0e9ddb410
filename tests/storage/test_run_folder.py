"""The run folder's small files."""

import json
import math

import pytest

from hiermpi.errors import UserError
from hiermpi.storage.run_folder import RunFolder


def test_metrics_round_trip_and_truncation(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    for step in range(1, 6):
        folder.append_metrics({"step": step, "loss": math.nan if step == 2 else 0.5, "phases": {"a": math.inf}})
    rows = folder.read_metrics()
    assert rows[1] == {"step": 2, "loss": None, "phases": {"a": None}}
    with open(folder.metrics, "a") as file:
        file.write('{"step": 6, "lo')  # a torn line, as a killed writer leaves it
    assert len(folder.read_metrics()) == 5
    folder.truncate_metrics(3)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        folder.read_metrics()


def test_markers(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.is_done()
    folder.mark_done("x")
    assert folder.is_done()
    folder.clear_done()
    folder.clear_done()
    assert not folder.is_done()
    folder.stop.touch()
    assert folder.stop_requested()
    folder.clear_stop()
    assert not folder.stop_requested()


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            RunFolder(path).prepare()


def test_errors_are_written_by_rank(tmp_path):
    path = RunFolder(tmp_path).write_error(7, "Traceback ...")
    assert path == tmp_path / "errors" / "rank-0007.txt"
    assert path.read_text() == "Traceback ..."
