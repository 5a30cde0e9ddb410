"""The shipped configurations: each is valid, found by name, and says what it is."""

import argparse

import pytest

from hiermpi.config.loading import add_config_arguments, load_config, presets
from hiermpi.errors import UsageError
from hiermpi.model.gpt2 import gpt2_specs
from hiermpi.model.parameters import ParameterLayout


def load(name):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args(["--config", name]), {})


@pytest.mark.parametrize("name", presets())
def test_each_is_valid(name):
    assert load(name).train.steps > 0
    assert presets()[name].read_text().startswith("# ")


def test_gpt2_has_the_size_of_gpt2():
    import dataclasses

    for name, millions in (("gpt2-small", 124.4), ("gpt2-medium", 354.8)):
        model = dataclasses.replace(load(name).model, vocab_size=50257)
        assert ParameterLayout(gpt2_specs(model)).count / 1e6 == pytest.approx(millions, abs=0.1)


def test_an_unknown_name_lists_them(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="or one of gpt2-medium, gpt2-small, nano, small, tiny"):
        load("huge")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("[train]\nsteps = 7\n")
    assert load("tiny").train.steps == 7  # a file of that name wins
