"""inspect: what is in a file, for a person and for a program."""

import dataclasses
import json

import numpy as np
import pytest

from hiermpi.cli import main
from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import BytesTokenizer
from hiermpi.errors import UserError
from hiermpi.interchange.exchange import imported
from hiermpi.model.gpt2 import gpt2_specs
from hiermpi.reporting.reading import bar, describe, inspect
from hiermpi.storage.checkpoint import load_checkpoint, parameters_digest, save_checkpoint
from runs import TINY, last_checkpoint, make_dataset, train_on


def test_dataset(tmp_path, capsys):
    data = make_dataset(tmp_path, "abcab\x1b[2J" * 100)
    found = inspect(data)
    assert found["kind"] == "dataset"
    assert found["tokens"] == found["bytes"] == {"train": 810, "val": 90}
    assert sum(found["group_share"]) == pytest.approx(1.0)
    assert found["frequent"][0] == {"id": 97, "text": "a", "count": 200}
    assert found["unused_tokens"] == 256 - 7
    assert main(["inspect", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "810 for training" in shown
    assert "\x1b" not in shown  # a file must not steer the terminal


def test_checkpoint_and_run(tmp_path, capsys):
    from mpi4py import MPI

    data = make_dataset(tmp_path)
    assert train_on(MPI.COMM_SELF, data, tmp_path / "run", *TINY, "--train.steps", "2") == 0
    capsys.readouterr()
    found = inspect(tmp_path / "run")
    checkpoint = last_checkpoint(tmp_path / "run")
    assert found["step"] == 2
    assert found["parameters_sha256"] == parameters_digest(checkpoint)
    assert found["config"]["model.n_layer"] == 2
    assert found == inspect(tmp_path / "run" / "checkpoints" / "step-00000002.h5")
    text = describe(found)
    assert "n_layer = 2" in text
    assert "wte.weight" in text
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_the_digest_is_of_the_parameters_alone(tmp_path):
    config = ModelConfig(vocab_size=7, context_length=4, n_layer=1, n_head=1, n_embd=4)
    tensors = {s.name: np.ones(s.shape, np.float32) for s in gpt2_specs(config)}
    one = imported(config, tensors, BytesTokenizer())
    save_checkpoint(tmp_path / "c.h5", dataclasses.replace(one, step=9, loss=1.0))
    other = load_checkpoint(tmp_path / "c.h5")
    assert parameters_digest(one) == parameters_digest(other)
    one.parameters["wte.weight"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert parameters_digest(one) != parameters_digest(other)


def test_what_cannot_be_inspected(tmp_path):
    (tmp_path / "x").write_text("text")
    for path in (tmp_path, tmp_path / "x", tmp_path / "none"):
        with pytest.raises(UserError):
            inspect(path)


def test_bar():
    assert bar(0.5, 1.0, 10) == "█████"
    assert bar(0.0, 0.0) == ""
