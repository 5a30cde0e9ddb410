"""Plug-ins that break their contract, in every way we know: one sentence that names them, on 1 and 3 ranks, no hang."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
from launch import BIN, environment
from plugins.plugged import REPOSITORY, SMALL, make_dataset, require_one_sentence, train

HEAD = f"""\
import sys
sys.path.append({str(REPOSITORY)!r})
import numpy as np
from hiermpi import Reduction, TensorSpec
from examples.own_model import TwoTokenFamily, TwoTokenModel
from examples.own_optimizer import Momentum
from examples.own_reduction import Ring
from mpi4py import MPI
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
"""
MODEL = """
class Model(TwoTokenModel):
    {}
class Mine(TwoTokenFamily):
    def make(self, config, parameters, sequences):
        return Model(config, parameters)
MINE = Mine()
"""
FAMILY = "class Mine(TwoTokenFamily):\n    {}\nMINE = Mine()\n"
RULE = "class Mine(Momentum):\n    {}\nMINE = Mine()\n"
RING = "class MINE(Ring):\n    {}\n"
ROUTING = "def MINE(counts, capacity, frequency):\n    {}\n"
SCHEDULE = "def MINE(step, *, learning_rate, **others):\n    {}\n"
LATER = "calls = 0\n    def reduce(self, sums, gradients):\n        MINE.calls += 1\n"
"""A reduction keeps its contract in its first steps, and breaks it later."""
WHERE = {
    MODEL: "model.family",
    FAMILY: "model.family",
    RULE: "optimizer.rule",
    RING: "hierarchy.reduction",
    ROUTING: "hierarchy.routing",
    SCHEDULE: "optimizer.schedule",
}


class Case(NamedTuple):
    """A way to break a contract."""

    frame: str
    code: str
    words: str
    ranks: tuple[int, ...] = (1, 3)
    """The numbers of ranks on which it breaks."""
    settings: tuple[tuple[str, object], ...] = ()


SEVERAL = (3,)
CASES = {
    # a model family
    "family lacks a method": Case(FAMILY, "make = None", "no method make"),
    "family raises in its constructor": Case(
        "class MINE:\n    def __init__(self):\n        {}\n", "raise ValueError('no\\nsuch')", "ValueError: no such"
    ),
    "specs raise": Case(FAMILY, "def specs(self, config): return config.no_such", "AttributeError"),
    "specs refuse": Case(FAMILY, "def specs(self, config): raise ValueError('n_embd is odd')", "n_embd is odd"),
    "specs are no specs": Case(FAMILY, "def specs(self, config): return ['table']", "TensorSpec"),
    "specs are none": Case(FAMILY, "def specs(self, config): return None", "TypeError"),
    "a shape is no shape": Case(FAMILY, "def specs(self, config): return [TensorSpec('a', 5)]", "'a'"),
    "a name is no name": Case(FAMILY, "def specs(self, config): return [TensorSpec(5, (5,))]", "5"),
    "two tensors of a name": Case(FAMILY, "def specs(self, config): return 2 * [TensorSpec('a', (5,))]", "same name"),
    "rows are not the vocabulary's": Case(
        FAMILY, "def specs(self, config): return [TensorSpec('a', (5, 5), symmetry_rows=True)]", "256 tokens"
    ),
    "make raises": Case(FAMILY, "def make(self, *arguments): 1 / 0", "ZeroDivisionError"),
    "make raises on one rank": Case(
        FAMILY,
        "def make(self, config, parameters, sequences): return TwoTokenModel(config if RANK < 2 else None, parameters)",
        "AttributeError",
        SEVERAL,
    ),
    "make gives nothing": Case(FAMILY, "def make(self, *arguments): return None", "no method loss"),
    "initialize raises": Case(FAMILY, "def initialize(self, model, seed): model.parameters['none']", "KeyError"),
    "initialize gives NaN": Case(
        FAMILY, "def initialize(self, model, seed): model.parameters['table'][3] = np.nan", "initialize"
    ),
    # a model
    "the model lacks a method": Case(MODEL, "loss_and_gradients = None", "no method loss_and_gradients"),
    "the model takes another buffer": Case(
        MODEL, "def __init__(self, config, parameters): self.parameters = None", "given buffer"
    ),
    "the gradient raises": Case(MODEL, "def loss_and_gradients(self, batch, gradients): 1 / 0", "ZeroDivisionError"),
    "the gradient raises on one rank": Case(
        MODEL,
        "def loss_and_gradients(self, batch, gradients):\n"
        "        if RANK == 1 and batch.step == 1: raise OSError('gone')\n"
        "        return super().loss_and_gradients(batch, gradients)",
        "OSError: gone",
        SEVERAL,
    ),
    "the gradient has a wrong shape": Case(
        MODEL, "def loss_and_gradients(self, batch, gradients): gradients += np.zeros(3, np.float32)", "ValueError"
    ),
    "the result is nothing": Case(MODEL, "def loss_and_gradients(self, *arguments): pass", "(loss_sum, n_tokens)"),
    "the result counts wrongly": Case(
        MODEL, "def loss_and_gradients(self, batch, gradients): return 1.0, 1.0", "counted 1 targets"
    ),
    "the gradient is never finite": Case(
        MODEL,
        "def loss_and_gradients(self, batch, gradients):\n"
        "        gradients[:] = np.nan\n        return super().loss(batch)",
        "steps in a row",
        settings=(("train.steps", 60),),
    ),
    "the loss is nothing": Case(MODEL, "def loss(self, batch): pass", "(loss_sum, n_tokens)"),
    "the loss raises on one rank": Case(
        MODEL, "def loss(self, batch): return super().loss(batch) if RANK != 1 else [][0]", "IndexError", SEVERAL
    ),
    "the workspace raises on one rank": Case(
        MODEL,
        "def workspace_elements(self): return 4 if RANK else 1 / 0\n    def share_workspaces(self, memories): pass\n"
        "    def work_in(self, slot): pass",
        "ZeroDivisionError",
    ),
    # an optimizer rule
    "rule lacks a method": Case(RULE, "update = None", "no method update"),
    "rule raises in its constructor": Case(
        "class MINE(Momentum):\n    {}\n", "def __init__(self): 1 / 0", "ZeroDivisionError"
    ),
    "state names are not distinct": Case(RULE, "state = ('m', 'm')", "distinct names"),
    "state is a list": Case(RULE, "state = ['m']", "distinct names"),
    "state raises": Case(RULE, "state = property(lambda self: 1 / 0)", "ZeroDivisionError"),
    "update raises": Case(RULE, "def update(self, new, old, gradients, hyper): 1 / 0", "ZeroDivisionError"),
    "update raises on one rank": Case(
        RULE,
        "def update(self, new, old, gradients, hyper):\n"
        "        if RANK == 2 and hyper.count == 2: raise OSError('gone')\n"
        "        super().update(new, old, gradients, hyper)",
        "OSError: gone",
        SEVERAL,
    ),
    "update returns what it should write": Case(
        RULE, "def update(self, new, old, gradients, hyper): return old.parameters * 0", "write into `new`"
    ),
    "update makes NaN": Case(
        RULE, "def update(self, new, *others): new.parameters[:] = np.nan", "parameters that are not finite"
    ),
    "update makes a state of NaN": Case(
        RULE, "def update(self, new, old, *others): new.state['momentum'][:] = np.nan", "momentum that are not finite"
    ),
    "update has a wrong shape": Case(
        RULE, "def update(self, new, old, gradients, hyper): new.parameters[:] = gradients[1:]", "ValueError"
    ),
    "update writes into the gradients": Case(
        RULE, "def update(self, new, old, gradients, hyper): gradients *= 2", "read-only"
    ),
    "update writes into what is old": Case(
        RULE, "def update(self, new, old, gradients, hyper): old.parameters[:] = 0", "read-only"
    ),
    "update reads a state that it does not name": Case(
        RULE, "def update(self, new, old, gradients, hyper): new.parameters[:] = old.state['v']", "KeyError: 'v'"
    ),
    "needs_whole raises": Case(RULE, "def needs_whole(self, spec): return spec.no_such", "AttributeError"),
    "rule_of gives nothing": Case(RULE, "def rule_of(self, spec): return None", "no method update"),
    "rule_of raises": Case(RULE, "def rule_of(self, spec): 1 / 0", "ZeroDivisionError"),
    "rule_of gives a rule of another state": Case(
        RULE,
        "def rule_of(self, spec):\n        from hiermpi.optimizer.rules import AdamW\n        return AdamW()",
        "m, v",
    ),
    # a schedule
    "schedule is no function": Case("MINE = {}\n", "3", "not a function"),
    "schedule gives NaN": Case(SCHEDULE, "return float('nan')", "nan"),
    "schedule gives nothing": Case(SCHEDULE, "return None", "TypeError"),
    "schedule falls below zero": Case(SCHEDULE, "return 2 - step", "-1"),
    "schedule raises once": Case(SCHEDULE, "return 0.1 if step != 4 else 1 / 0", "ZeroDivisionError"),
    # a reduction
    "reduction lacks a method": Case(RING, "broadcast = None", "no broadcast"),
    "reduction raises in its constructor": Case(RING, "def __init__(self, *arguments): 1 / 0", "ZeroDivisionError"),
    "reduction raises in its constructor on one rank": Case(
        RING,
        "def __init__(self, *arguments):\n        super().__init__(*arguments)\n        if RANK == 1: 1 / 0",
        "ZeroDivisionError",
        SEVERAL,
    ),
    "reduction is nothing": Case("def MINE(comms, ownership, vectors): {}\n", "pass", "has no gradient_vector"),
    "usable raises": Case(
        RING,
        "usable = classmethod(lambda cls, comms: 1 / 0)",
        "ZeroDivisionError",
        SEVERAL,
        (("hierarchy.reduction", "auto,mine:MINE"),),
    ),
    "gradients of a wrong type": Case(RING, "def gradient_vector(self): return np.zeros(3)", "gradient_vector()"),
    "reduce gives nothing": Case(RING, "def reduce(self, sums, gradients): pass", "what reduce() returns"),
    "reduce sums wrongly": Case(RING, "def reduce(self, sums, gradients): return gradients", "wrong sums", SEVERAL),
    "reduce raises at first on one rank": Case(
        RING,
        "def reduce(self, sums, gradients):\n        if RANK == 1: raise OSError('gone')\n"
        "        return super().reduce(sums, gradients)",
        "OSError: gone",
        SEVERAL,
    ),
    "reduce raises later on one rank": Case(
        RING,
        f"{LATER}        if RANK == 1 and MINE.calls > 3: raise OSError('gone')\n"
        "        return super().reduce(sums, gradients)",
        "OSError: gone",
        SEVERAL,
    ),
    "reduce gives nothing later": Case(
        RING,
        f"{LATER}        total = super().reduce(sums, gradients)\n        return total if MINE.calls < 3 else None",
        "what reduce() returns",
    ),
    "broadcast raises later": Case(
        RING,
        "calls = 0\n    def broadcast(self, verdict, parameters):\n        MINE.calls += 1\n"
        "        if MINE.calls > 3: 1 / 0\n        super().broadcast(verdict, parameters)",
        "ZeroDivisionError",
    ),
    # a routing rule: it is not asked on one rank
    "routing is no function": Case("MINE = {}\n", "3", "not a function"),
    "routing raises in its constructor": Case(
        "class MINE:\n    {}\n", "def __init__(self): 1 / 0", "ZeroDivisionError"
    ),
    "routing raises": Case(ROUTING, "1 / 0", "ZeroDivisionError", SEVERAL),
    "routing gives nothing": Case(ROUTING, "pass", "the bin of each of 26 units", SEVERAL),
    "routing gives too few": Case(ROUTING, "return np.zeros(3, np.int64)", "the bin of each of 26 units", SEVERAL),
    "routing gives fractions": Case(ROUTING, "return np.zeros(len(counts))", "as integers", SEVERAL),
    "routing chooses a bin that is not": Case(ROUTING, "return np.full(len(counts), 1000)", "bin 1000", SEVERAL),
    "routing chooses a bin below zero": Case(ROUTING, "return np.full(len(counts), -1)", "bin -1", SEVERAL),
    "routing writes into the counts": Case(ROUTING, "counts[:] = 0", "read-only", SEVERAL),
    "routing writes into the frequencies": Case(ROUTING, "frequency[:] = 0", "read-only", SEVERAL),
    "routing raises as it learns": Case(
        "class MINE:\n    def learn(self, counts, capacity): {}\n    def __call__(self, *arguments): pass\n",
        "1 / 0",
        "ZeroDivisionError",
        SEVERAL,
    ),
}
SETTING_OF = {"family": "model.family", "rule": "optimizer.rule", "schedule": "optimizer.schedule"}
SETTING_OF |= {"reduction": "hierarchy.reduction", "routing": "hierarchy.routing"}

IN_A_STEP = {
    *("the gradient raises", "the gradient raises on one rank", "the gradient has a wrong shape"),
    *("the result is nothing", "the result counts wrongly", "the loss is nothing", "the loss raises on one rank"),
    *("update raises", "update raises on one rank", "update returns what it should write", "update makes NaN"),
    *("update makes a state of NaN", "update has a wrong shape", "update writes into the gradients"),
    *("update writes into what is old", "update reads a state that it does not name", "schedule raises once"),
    *("reduce raises at first on one rank", "reduce raises later on one rank", "reduce gives nothing later"),
    *("broadcast raises later", "routing raises", "routing gives nothing", "routing gives too few"),
    *("routing gives fractions", "routing chooses a bin that is not", "routing chooses a bin below zero"),
    *("routing writes into the counts", "routing writes into the frequencies"),
}
"""Those that are found where the ranks cannot agree any more: the rank that finds it ends all. The others are raised on
every rank."""
ONE_AFTER_ANOTHER = """
import json, sys
sys.path.append(".")
import hiermpi
from mpi4py import MPI
for name, setting, settings in json.load(open("asked.json")):
    told = "no error"
    try:
        hiermpi.train(hiermpi.Config.of(settings), data=sys.argv[1], run=f"runs/{name}")
    except hiermpi.UserError as error:
        told = str(error)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps([name, told]), flush=True)
"""


def setting_of(name):
    """Return the setting that names the plug-in of a case."""
    case = CASES[name]
    return WHERE.get(case.frame) or SETTING_OF[name.split()[0]]


def settings_of(name, module):
    """Return the settings of a case whose code is in ``module``."""
    chosen = {setting_of(name): f"{module}:MINE", "hierarchy.reduction": "tree"} | {setting_of(name): f"{module}:MINE"}
    own = {key: value.replace("mine:", f"{module}:") if key in chosen else value for key, value in CASES[name].settings}
    return {**SMALL, **chosen, **own}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_is_named_on_every_rank(data, tmp_path, ranks):
    asked = []
    for index, (name, case) in enumerate(CASES.items()):
        if ranks in case.ranks and (ranks == 1 or name not in IN_A_STEP):
            (tmp_path / f"broken_{index}.py").write_text(HEAD + case.frame.format(case.code))
            asked.append([name, setting_of(name), settings_of(name, f"broken_{index}")])
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "one.py").write_text(ONE_AFTER_ANOTHER)
    result = subprocess.run(
        [BIN / "mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py", "one.py", data],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = dict(json.loads(line) for line in result.stdout.splitlines())
    wrong = {}
    for name, setting, settings in asked:
        named = f"{setting} = {settings[setting].removeprefix('auto,')}" in told[name]
        if not named or CASES[name].words not in told[name] or "\n" in told[name]:
            wrong[name] = told[name]
    assert not wrong


LAUNCHED = [
    "specs refuse",
    "broadcast raises later",
    "reduce raises later on one rank",
    "routing chooses a bin that is not",
    "the gradient raises on one rank",
    "the loss is nothing",
    "update makes NaN",
    "update raises on one rank",
]
"""What every test run launches; ``make test-matrix`` launches all."""
if os.environ.get("HIERMPI_TEST_MATRIX") == "all":
    LAUNCHED = ["family lacks a method", "specs refuse", *sorted(IN_A_STEP)]


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launched_ranks_tell_one_sentence(name, data, tmp_path):
    case = CASES[name]
    (tmp_path / "mine.py").write_text(HEAD + case.frame.format(case.code))
    result = train(data, tmp_path / "run", settings_of(name, "mine"), ranks=3, cwd=tmp_path, timeout=20)
    require_one_sentence(result, 2 if name == "specs refuse" else 1, f"{setting_of(name)} = mine:MINE", case.words)
