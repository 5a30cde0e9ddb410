"""Checkpoints of models from outside: their code is imported only where the user says so, and what it lacks is told."""

import json
import textwrap

import pytest
from plugins.plugged import make_dataset, require_one_sentence, run, train, trained

from hiermpi.model import contract

MODEL = {"model.family": "mine:FAMILY", "model.options": "{hidden = 20}"}
ALLOWED = ("--model.family", "mine:FAMILY")
EXAMPLE = textwrap.dedent(contract.__doc__.partition("::\n")[2].partition("\nThe option ")[0])
"""The model that the contract's own documentation shows."""
CODE = f"""
from pathlib import Path

(Path(__file__).parent / "imported").touch()
{EXAMPLE}

class Family(BigramFamily):
    def make(self, config, parameters, sequences):
        config.options.get("hidden")
        return super().make(config, parameters, sequences)


FAMILY = Family()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run of a model without logits, decoder and figures."""
    found = tmp_path_factory.mktemp("outside")
    (found / "mine.py").write_text(CODE)
    trained(make_dataset(found), found / "run", MODEL, ranks=2, cwd=found)
    assert (found / "imported").exists()
    return found


def commands(folder):
    return {
        "evaluate": ("evaluate", folder / "run", "--data", folder / "data.h5"),
        "generate": ("generate", folder / "run", "--prompt", "def"),
        "export": ("export", folder / "run", "--format", "npz", "--out", folder / "out.npz"),
    }


@pytest.mark.parametrize("name", ["evaluate", "generate", "export"])
def test_code_is_not_imported_because_a_checkpoint_names_it(folder, name):
    (folder / "imported").unlink(missing_ok=True)
    result = run(*commands(folder)[name], cwd=folder)
    require_one_sentence(result, 2, "family mine:FAMILY", "not a part of hiermpi", "add --model.family mine:FAMILY")
    other = run(*commands(folder)[name], "--model.family", "gpt2", cwd=folder)
    require_one_sentence(other, 2, "mine:FAMILY")
    assert not (folder / "imported").exists()


def test_with_the_family_it_is_evaluated_on_any_number_of_ranks(folder):
    found = [run(*commands(folder)["evaluate"], *ALLOWED, "--json", ranks=ranks, cwd=folder) for ranks in (0, 3)]
    assert not any(result.returncode for result in found), found
    alone, together = (json.loads(result.stdout) for result in found)
    assert alone == together


def test_without_logits_it_generates_nothing_and_says_so(folder):
    result = run(*commands(folder)["generate"], *ALLOWED, cwd=folder)
    require_one_sentence(result, 1, "gives no logits", "method logits(batch)")


def test_it_goes_out_and_comes_back(folder):
    assert run(*commands(folder)["export"], *ALLOWED, cwd=folder).returncode == 0
    refused = run("export", folder / "run", "--format", "hf", "--out", folder / "hf", *ALLOWED, cwd=folder)
    require_one_sentence(refused, 1, "mine:FAMILY")
    (folder / "imported").unlink()
    back = ("import", folder / "out.npz", "--out", folder / "back.h5")
    require_one_sentence(run(*back, cwd=folder), 2, "add --model.family mine:FAMILY")
    assert not (folder / "imported").exists()
    assert run(*back, *ALLOWED, cwd=folder).returncode == 0
    assert run("verify", "--digest", folder / "run", folder / "back.h5").returncode == 0


def test_inspect_needs_no_code(folder):
    (folder / "imported").unlink(missing_ok=True)
    result = run("inspect", folder / "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "mine:FAMILY" in result.stdout
    assert not (folder / "imported").exists()


def test_a_plan_says_what_the_family_does_not(folder):
    result = run("plan", "--ranks", 3, "--data", folder / "data.h5", *ALLOWED, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "flops_per_token" in result.stdout
    broken = "\n\nclass Wrong(Family):\n    def flops_per_token(self, config): return None\n"
    broken += "    def workspace_bytes(self, config, sequences): return -1\nWRONG = Wrong()\n"
    (folder / "wrong.py").write_text(CODE + broken)
    result = run("plan", "--ranks", 3, "--model.family", "wrong:WRONG", cwd=folder)
    require_one_sentence(result, 1, "model.family = wrong:WRONG", "workspace_bytes returned -1")


def test_settings_that_nobody_reads_are_named_in_one_line(folder):
    (folder / "rule.py").write_text(RULE)
    result = train(
        folder / "data.h5",
        folder / "unread",
        {
            **MODEL,
            "model.options": "{hidden = 20, depth = 3}",
            "model.dropout": 0.1,
            "optimizer.rule": "rule:RULE",
            "optimizer.options": "{momentum = 0.8, nesterov = true}",
            "optimizer.beta2": 0.95,
            "optimizer.weight_decay": 0.2,
            "train.steps": 2,
        },
        ranks=2,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "reads" in line]
    names = {"model.options.depth", "model.n_layer", "model.n_head", "model.n_embd", "model.dropout"}
    names |= {"optimizer.options.nesterov", "optimizer.beta2"}
    assert len(lines) == 1, result.stderr
    assert names == set(lines[0].split("warning: ")[1].split(": ")[0].split(", "))


RULE = """
class Rule:
    state = ()

    def update(self, new, old, gradients, hyper):
        rate = hyper.learning_rate * hyper.options.get("momentum", 1.0)
        new.parameters[:] = old.parameters * (1 - rate * hyper.weight_decay) - rate * hyper.scale * gradients


RULE = Rule()
"""
