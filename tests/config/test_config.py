"""Precedence, types, ranges, and sentences that help."""

import argparse
import tomllib

import pytest

from hiermpi.config.loading import add_config_arguments, config_to_toml, load_config
from hiermpi.config.schema import Config, config_from_flat, duration_seconds, flatten
from hiermpi.errors import UsageError


def load(*argv, environment=None):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args(argv), environment or {})


def test_command_line_beats_environment_beats_file_beats_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 3\nbatch_size = 5\nseed = 7\n")
    environment = {"HIERMPI_TRAIN__STEPS": "2", "HIERMPI_TRAIN__SEED": "9"}
    config = load("--config", str(file), "--train.steps", "1", environment=environment)
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (1, 9, 5)
    assert config.train.log_interval == Config().train.log_interval


def test_fixed_defaults():
    model = Config().model
    assert (model.vocab_size, model.context_length, model.n_layer, model.n_head) == (0, 256, 4, 4)
    assert (model.n_embd, model.symmetry_order, model.tie_embeddings, model.dropout) == (128, 12, True, 0.0)
    assert Config().train.grad_clip == 1.0
    assert Config().checkpoint.keep_last == 3


def test_toml_round_trip():
    config = load("--model.n_embd", "96", "--run.time_limit", "1-00:00:00", "--model.tie_embeddings", "false")
    table = tomllib.loads(config_to_toml(config))
    flat = {f"{section}.{key}": value for section, entries in table.items() for key, value in entries.items()}
    assert config_from_flat(flat, "x.toml") == config
    assert flatten(config) == flat


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train.batch_size", "0"], "--train.batch_size = '0': expected at least 1"),
        (["--train.steps", "many"], "--train.steps = 'many': expected a whole number"),
        (["--train.steps", "1.5"], "--train.steps = '1.5': expected a whole number"),
        (["--optimizer.learning_rate", "fast"], "expected a number"),
        (["--optimizer.learning_rate", "inf"], "expected a finite number"),
        (["--optimizer.learning_rate", "0"], "expected more than 0"),
        (["--model.dropout", "1"], "expected less than 1"),
        (["--model.tie_embeddings", "maybe"], "expected true or false"),
        (["--hierarchy.routing", "best"], "expected one of balanced, dominant, lift, or package.module:object"),
        (["--run.time_limit", "soon"], '"soon" is not a duration'),
        (["--optimizer.min_learning_rate", "1"], "is above optimizer.learning_rate"),
    ],
)
def test_a_wrong_value_is_one_sentence(argv, sentence):
    with pytest.raises(UsageError) as caught:
        load(*argv)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nbatchsize = 3\n", 'did you mean "train.batch_size"?'),
        ("[trian]\nsteps = 3\n", 'did you mean "train"?'),
        ("train = 3\n", "write [train]"),
        ("[train\n", "is not valid TOML"),
        ('[train]\nsteps = "x"\n', "train.steps in"),
        ("[train]\nsteps = true\n", "other than true or false"),
        ("[train]\nsteps = [1]\n", "expected a whole number"),
        ("x = " + "[" * 5000, "is not valid TOML"),
        ("a = 1\n" * 400_000, "larger than 1 MiB"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load("--config", str(file))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load("--config", str(tmp_path / "none.toml"))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        load("--config", str(tmp_path / "b.toml"))


def test_environment_names_are_checked():
    with pytest.raises(UsageError, match='did you mean "HIERMPI_TRAIN__STEPS"'):
        load(environment={"HIERMPI_TRAIN__STEP": "3"})
    with pytest.raises(UsageError, match='did you mean "HIERMPI_TRAIN__STEPS"'):
        load(environment={"HIERMPI_TRAIN_STEPS": "3"})
    load(environment={"HIERMPI_ROOT": "/opt/hiermpi"})  # as module systems set it


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", float("inf")), ("90", 90), ("1:30", 90), ("01:00:00", 3600), ("2-00:00:01", 172801), ("1-2", 93600)],
)
def test_durations(text, seconds):
    assert duration_seconds(text) == seconds


def test_a_duration_may_be_a_number(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[run]\ntime_limit = 120\n")
    assert load("--config", str(file)).run.time_limit == "120"
