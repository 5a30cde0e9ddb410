"""Readers, sinks and formats of the user's own."""

import csv

import pytest
from plugins.plugged import TEXT, make_dataset, require_one_sentence, run, train, trained

SINK = """
import json


class Lines:
    def open(self, run):
        self.file = open(run.folder / "lines.txt", "a")
        self.file.write(f"from {run.first_step}\\n")

    def record(self, row):
        self.file.write(json.dumps(row["step"]) + "\\n")

    def ranks(self, records):
        self.file.write(f"{len(records)} ranks\\n")

    def close(self):
        self.file.write("end\\n")
        self.file.close()


SINK = Lines
"""
FORMAT = """
import pickle

from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import tokenizer_from_json
from hiermpi.interchange.exchange import imported
from hiermpi.storage.checkpoint import model_config


class Pickled:
    suffix = ".pickle"
    file_names = ("model.pickle",)

    def write(self, folder, checkpoint):
        parts = vars(model_config(checkpoint)), checkpoint.tokenizer, dict(checkpoint.parameters)
        (folder / "model.pickle").write_bytes(pickle.dumps(parts))

    def accepts(self, source):
        return source.suffix == self.suffix

    def read(self, source):
        shape, tokenizer, parameters = pickle.loads(source.read_bytes())
        return imported(ModelConfig(**shape), parameters, tokenizer_from_json(tokenizer))


FORMAT = Pickled()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of the package's own model."""
    folder = tmp_path_factory.mktemp("finished")
    trained(make_dataset(folder), folder / "run", ranks=1)
    return folder


def test_a_reader_gives_the_same_dataset_on_any_number_of_ranks(tmp_path):
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([index, text] for index, text in enumerate(TEXT.split("\n\n")[:150]))
    (tmp_path / "plain.txt").write_text("a plain text\n" * 9)
    reader = ("--reader", "examples.own_reader:READER")
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}.h5"
        result = run("prepare", tmp_path / "rows.csv", tmp_path / "plain.txt", "--out", out, *reader, ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "3.h5").read_bytes()
    expected = sum(len(text.encode()) + 1 for text in TEXT.split("\n\n")[:150]) + 9 * len("a plain text\n")
    assert f"{expected:,} bytes" in result.stdout


def test_a_sink_is_told_of_the_run(tmp_path):
    (tmp_path / "mine.py").write_text(SINK)
    data, settings = make_dataset(tmp_path), {"run.sinks": "csv, mine:SINK", "train.log_interval": 2}
    folder = trained(data, tmp_path / "run", {**settings, "train.steps": 2}, ranks=2, cwd=tmp_path)
    trained(data, folder, {**settings, "train.steps": 3}, ranks=1, cwd=tmp_path)
    lines = (folder / "lines.txt").read_text().splitlines()
    assert lines == ["from 0", "1", "2", "2 ranks", "end", "from 2", "3", "end"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


def test_a_format_goes_out_and_comes_back(finished, tmp_path):
    (tmp_path / "mine.py").write_text(FORMAT)
    out, back = tmp_path / "model.pickle", tmp_path / "back.h5"
    result = run("export", finished / "run", "--out", out, "--format", "mine:FORMAT", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert out.is_file()
    again = run("export", finished / "run", "--out", out, "--format", "mine:FORMAT", "--force", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    result = run("import", out, "--out", back, "--format", "mine:FORMAT", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run("verify", "--digest", finished / "run", back).returncode == 0
    require_one_sentence(run("import", out, "--out", back, "--format", "hfx", "--force"), 2, "--format = 'hfx'", '"hf"')


BROKEN_FORMATS = {
    "FORMAT = object()": "no method write",
    "class FORMAT:\n    suffix = 'bin'\n    file_names = ()\n    def write(self, f, c): ...": "`suffix`",
    "class FORMAT:\n    suffix = ''\n    file_names = 'x'\n    def write(self, f, c): ...": "`file_names`",
    "class FORMAT:\n    suffix = '.x'\n    file_names = ()\n    def write(self, f, c): 1 / 0": "ZeroDivisionError",
    "class FORMAT:\n    suffix = '.x'\n    file_names = ()\n    def write(self, f, c): ...": "model.x",
    "class FORMAT:\n    def __init__(self): raise OSError('no\\nline')": "OSError: no line",
}


@pytest.mark.parametrize("code", BROKEN_FORMATS)
def test_a_broken_format_is_named(finished, tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    result = run("export", finished / "run", "--out", tmp_path / "out", "--format", "mine:FORMAT", cwd=tmp_path)
    require_one_sentence(result, 1, "--format = mine:FORMAT", BROKEN_FORMATS[code])
    assert not (tmp_path / "out").exists()


DOCUMENT = "import io\nclass D:\n    name, named = 'd', True\n    def size(self): {size}\n    def open(self): {open}\n"
READER = "class READER:\n    def accepts(self, path): {accepts}\n    def documents(self, path, named): {documents}\n"
GOOD = {
    **{"accepts": "return True", "documents": "return [D()]", "size": "return 40"},
    "open": "return io.BytesIO(b'ab\\n' * 40)",
}
BROKEN_READERS = {
    "accepts": ("return 1 / 0", "ZeroDivisionError"),
    "documents": ("return [path]", "not documents"),
    "documents ": ("return None", "TypeError"),
    "size": ("return None", "size()"),
    "open": ("return io.StringIO('text')", "open()"),
    "open ": ("raise KeyError('x')", "KeyError"),
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", BROKEN_READERS)
def test_a_broken_reader_is_named(tmp_path, name, ranks):
    code, words = BROKEN_READERS[name]
    (tmp_path / "mine.py").write_text((DOCUMENT + READER).format(**{**GOOD, name.strip(): code}))
    (tmp_path / "text.txt").write_text("text")
    arguments = ("prepare", tmp_path / "text.txt", "--out", tmp_path / "data.h5", "--reader", "mine:READER")
    require_one_sentence(run(*arguments, ranks=ranks, cwd=tmp_path), 1, "--reader mine:READER", words)
    assert not (tmp_path / "data.h5").exists()


def test_a_reader_without_a_method_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("READER = object()")
    (tmp_path / "text.txt").write_text("text")
    arguments = ("prepare", tmp_path / "text.txt", "--out", tmp_path / "data.h5", "--reader", "mine:READER")
    require_one_sentence(run(*arguments, cwd=tmp_path), 1, "--reader mine:READER", "no method accepts")


BROKEN_SINKS = {
    "def record(self, row): raise OSError('disk\\nfull')": "OSError: disk full",
    "def open(self, run): 1 / 0": "ZeroDivisionError",
    "def __init__(self): raise ValueError('no')": "ValueError: no",
    "def close(self): raise ValueError('shut')": "ValueError: shut",
    "record = None": "no method record",
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("line", BROKEN_SINKS)
def test_a_broken_sink_is_named(finished, tmp_path, line, ranks):
    (tmp_path / "mine.py").write_text(
        "class Good:\n    def open(self, run): ...\n    def record(self, row): ...\n    def close(self): ...\n\n\n"
        f"class SINK(Good):\n    {line}\n"
    )
    settings = {"run.sinks": "mine:SINK", "train.steps": 2}
    result = train(finished / "data.h5", tmp_path / "run", settings, ranks=ranks, cwd=tmp_path, timeout=20)
    require_one_sentence(result, 1, "run.sinks: mine:SINK", BROKEN_SINKS[line])


