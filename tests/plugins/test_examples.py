"""The plug-ins in ``examples/``: one model on any number of ranks, stopped and resumed on others, shown by the plan."""

import json

import pytest
from plugins.plugged import losses, make_dataset, run, train, trained

MODEL = {"model.family": "examples.own_model:FAMILY", "model.options": "{hidden = 20}"}
OPTIMIZER = {"optimizer.rule": "examples.own_optimizer:RULE", "optimizer.learning_rate": 0.3}
REDUCTION = {"hierarchy.reduction": "examples.own_reduction:REDUCTION"}
ROUTING = {"hierarchy.routing": "examples.own_routing:ROUTING"}
EXAMPLES = {"model": MODEL, "optimizer": OPTIMIZER, "reduction": REDUCTION, "routing": ROUTING}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_13_ranks_resumed_on_3_make_the_same_bits_as_1(name, data, tmp_path):
    settings = {**EXAMPLES[name], "hierarchy.reproducible": "true"}
    alone = trained(data, tmp_path / "alone", settings, ranks=1)
    together = trained(data, tmp_path / "together", {**settings, "train.steps": 3}, ranks=13)
    assert len(losses(together)) == 3
    trained(data, together, settings, ranks=3)
    assert len(losses(alone)) == 6
    assert losses(together) == pytest.approx(losses(alone), rel=1e-12)
    compared = run("verify", "--digest", alone, together)
    assert compared.returncode == 0, compared.stdout
    assert "the same parameters" in compared.stdout


def test_all_of_them_together_train_as_one_rank_does(data, tmp_path):
    settings = {**MODEL, **OPTIMIZER, **ROUTING, "hierarchy.reduction": "auto,examples.own_reduction:REDUCTION"}
    alone = trained(data, tmp_path / "alone", settings, ranks=1)
    result = train(data, tmp_path / "together", settings, ranks=3)
    assert result.returncode == 0, result.stderr
    chosen = next(line for line in result.stderr.splitlines() if line.startswith("hierarchy.reduction:"))
    assert "examples.own_reduction:REDUCTION" in chosen
    assert losses(tmp_path / "together") == pytest.approx(losses(alone), rel=1e-5)
    assert losses(alone)[-1] < losses(alone)[0]


def test_the_plan_knows_them(data):
    every = {**MODEL, **OPTIMIZER, **REDUCTION, **ROUTING}
    flags = [word for name, value in every.items() for word in (f"--{name}", value)]
    result = run("plan", "--ranks", 13, "--data", data, "--model.n_embd", 24, "--json", *flags)
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["parameters"] == 256 * 24 + 48 * 20 + 256 * 20 + 20
    assert planned["family"] == MODEL["model.family"]
    assert planned["not_given"] == ["flops_per_token", "workspace_bytes"]
    assert planned["shared_memory"] is False
    text = run("plan", "--ranks", 13, "--data", data, *flags)
    assert text.returncode == 0, text.stderr


def test_a_module_of_the_users_does_not_take_the_place_of_pythons(data, tmp_path):
    for name in ("random", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this file shadows another module')\n")
    (tmp_path / "mine.py").write_text(
        "import random\n\ndef last(counts, capacity, frequency):\n"
        "    return (capacity > 0).nonzero()[0][[-1] * len(counts)]\n"
    )
    trained(data, tmp_path / "run", {"hierarchy.routing": "mine:last"}, ranks=2, cwd=tmp_path)
