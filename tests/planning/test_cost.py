"""The cost model: arithmetic on measures, kept as JSON."""

import dataclasses
import json

import pytest

from hiermpi.cli import main
from hiermpi.config.schema import Config, HierarchyConfig, ModelConfig, OptimizerConfig, TrainConfig
from hiermpi.hierarchy.topology import Topology
from hiermpi.model.contract import micro_batch_sequences
from hiermpi.model.gpt2 import flops_per_token
from hiermpi.planning.cost import Line, Machine, fewest_tokens, forecast, machine_from_json, predict

MODEL = ModelConfig(vocab_size=256)
MACHINE = Machine(
    host="here",
    date="2026-01-01",
    cores=2,
    ranks=13,
    token_flops=flops_per_token(MODEL),
    token_seconds=1e-4,
    call_seconds=1e-3,
    sum_rate=2e10,
    optimize_seconds=1e-9,
    batch_seconds=1e-5,
    overhead_seconds=1e-4,
    crowded_overhead_seconds=1e-3,
    root_seconds=1e-3,
    tree=Line(3e-3, 7e9),
    flat=Line(4e-3, 5e9),
)


def config_of(batch=48, **changes):
    hierarchy = HierarchyConfig(**{name: changes[name] for name in ("reduction", "coordinators") if name in changes})
    optimizer = OptimizerConfig(placement=changes.get("placement", "sharded"))
    return Config(model=MODEL, train=TrainConfig(batch_size=batch), hierarchy=hierarchy, optimizer=optimizer)


def step(ranks, batch=48, per_node=0, machine=MACHINE, **changes):
    topology = Topology(ranks, 12, per_node, coordinators=changes.get("coordinators", "compute"))
    return predict(machine, topology, config_of(batch, **changes), MODEL)


def test_one_rank_computes_everything():
    found = step(1)
    assert found.compute == pytest.approx(48 / micro_batch_sequences(MODEL) * 1e-3 + 48 * 256 * 1e-4 + 48e-5)
    assert (found.reduce, found.other) == (0.0, 0.0)
    assert found.step_seconds == pytest.approx(found.compute + found.optimize)


def test_two_cores_are_worth_two_and_no_more():
    assert 1.8 < step(1).step_seconds / step(2).step_seconds <= 2.0
    assert step(13).step_seconds > step(2).step_seconds
    assert step(64).step_seconds > step(13).step_seconds


def test_turns_end_when_the_last_one_does():
    equal, unequal = step(13, batch=26).compute, step(13, batch=24).compute
    sequence, call, batch = 256 * MACHINE.token_seconds, MACHINE.call_seconds, MACHINE.batch_seconds
    assert equal == pytest.approx(7 * (2 * sequence + call) + 26 * batch / 2)  # seven on one core, six on the other
    assert unequal == pytest.approx(12 * sequence + 7 * call + 24 * batch / 2)  # two of one sequence end together


def test_with_a_core_for_each_rank_the_slowest_counts():
    large = dataclasses.replace(MACHINE, cores=64)
    assert step(48, machine=large).compute < step(47, machine=large).compute
    assert step(47, machine=large).compute == pytest.approx(step(25, machine=large).compute)


def test_sharing_out_takes_the_root_s_time_away():
    large = dataclasses.replace(MACHINE, cores=64)
    root, sharded = (step(13, machine=large, placement=placement) for placement in ("root", "sharded"))
    assert root.optimize == pytest.approx(1e-9 * 858_880, rel=1e-3)
    assert sharded.optimize < root.optimize / 10


def test_shared_memory_is_faster_than_messages_and_nodes_cost_messages():
    assert step(13, reduction="shared").reduce < step(13, reduction="tree").reduce < step(13, reduction="flat").reduce
    assert step(16, per_node=4).reduce > step(4).reduce


def test_more_tokens_a_step_are_used_better():
    large = dataclasses.replace(MACHINE, cores=64)
    utilisations = [step(64, batch=64 * k, machine=large).utilisation for k in (1, 2, 8, 64)]
    assert utilisations == sorted(utilisations)
    assert 0 < utilisations[0] < utilisations[-1] <= 1


def test_thresholds_are_the_first_batch_that_is_enough():
    large = dataclasses.replace(MACHINE, cores=64)
    topology = Topology(64, coordinators="dedicated")
    config = config_of(coordinators="dedicated")
    tokens = fewest_tokens(large, topology, config, MODEL, lambda p: p.root_to_worker >= 40)
    assert tokens is not None
    sequences = tokens // 256
    for each, good in ((sequences, True), (sequences - 1, False)):
        found = step(64, batch=51 * each, machine=large, coordinators="dedicated") if each else None
        assert (found is not None and found.root_to_worker >= 40) == good
    assert fewest_tokens(large, topology, config, MODEL, lambda p: p.utilisation > 2) is None


def test_the_forecast_is_plain_data():
    found = forecast(MACHINE, Topology(13), config_of(), 256)
    assert json.loads(json.dumps(found)) == found
    assert found["speed_up"] == pytest.approx(step(1).step_seconds / step(13).step_seconds)


def test_a_machine_survives_json():
    assert machine_from_json(MACHINE.to_json()) == MACHINE


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cores": 0}, "cores is not a positive number"),
        ({"token_seconds": "fast"}, "token_seconds is not a positive number"),
        ({"tree": [1]}, "tree is not two numbers"),
        ({"sum_rate": float("nan")}, "sum_rate is not a positive number"),
    ],
)
def test_a_damaged_machine_is_named(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        machine_from_json(json.dumps(json.loads(MACHINE.to_json()) | change))


def test_plan_predicts_from_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["plan", "--ranks", "13"]) == 0
    assert "not known: run mpirun -n 13 hiermpi bench reduce" in capsys.readouterr().out
    kept = tmp_path / "hiermpi" / "machine.json"
    kept.parent.mkdir()
    kept.write_text(MACHINE.to_json())
    assert main(["plan", "--ranks", "13"]) == 0
    assert "13 ranks on 2 cores of here, 2026-01-01" in capsys.readouterr().out
    assert main(["plan", "--ranks", "13", "--json", "--machine", str(kept)]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["step_seconds"] > 0
    kept.write_text("{}")
    assert main(["plan", "--ranks", "13"]) == 2
    assert "is not what hiermpi bench reduce wrote" in capsys.readouterr().err
    assert main(["plan", "--ranks", "13", "--machine", str(tmp_path / "none.json")]) != 0
    assert "none.json" in capsys.readouterr().err
