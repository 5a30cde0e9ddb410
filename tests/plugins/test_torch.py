"""A module of PyTorch's trained by hiermpi: the losses of DistributedDataParallel, on one or two ranks."""

import json
import socket
import subprocess
import sys

import pytest
from launch import environment
from plugins.plugged import REPOSITORY, SMALL, losses, make_dataset, run, trained

pytest.importorskip("torch", reason="torch is not installed: pip install 'hiermpi[torch]'")

RULE = """
class Descent:
    state = ()

    def update(self, new, old, gradients, hyper):
        new.parameters[:] = old.parameters - hyper.learning_rate * hyper.scale * gradients


RULE = Descent()
"""
MODEL = {"model.family": "examples.own_torch_model:FAMILY"}
SETTINGS = {
    **{"optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.learning_rate": 0.5},
    **{"train.grad_clip": 0, "train.steps": 20},
}
RANKS = 2


def train_by_ddp(data, out, settings):
    """Train with DDP on two processes; return the losses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, REPOSITORY / "tests" / "plugins" / "ddp.py", data, out, settings["train.steps"], RANKS]
    started = [
        subprocess.Popen([*map(str, words), str(rank), str(port), json.dumps(settings)], env=environment())
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(60) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
    return json.loads(out.read_text())["losses"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def test_it_has_the_losses_of_ddp(data, tmp_path):
    (tmp_path / "descent.py").write_text(RULE)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    settings = {**MODEL, **SETTINGS, "optimizer.rule": "descent:RULE"}
    folder = trained(data, tmp_path / "run", settings, ranks=RANKS, cwd=tmp_path)
    expected = train_by_ddp(data, tmp_path / "ddp.json", {**SMALL, **SETTINGS, "model.vocab_size": 256})
    assert losses(folder) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.1


def test_it_makes_the_same_bits_on_any_number_of_ranks_and_generates(data, tmp_path):
    settings = {**MODEL, "hierarchy.reproducible": "true", "train.steps": 4}
    alone = trained(data, tmp_path / "alone", settings, ranks=1)
    together = trained(data, tmp_path / "together", {**settings, "train.steps": 2}, ranks=3)
    trained(data, together, settings, ranks=2)
    assert run("verify", "--digest", alone, together).returncode == 0
    result = run("generate", together, "--prompt", "def", "--tokens", 5, "--model.family", MODEL["model.family"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def")
