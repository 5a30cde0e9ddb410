"""plan: the tree as drawn, loads and bytes in closed form, suggestions."""

import json

import pytest

from hiermpi.cli import main
from hiermpi.config.schema import Config, HierarchyConfig, ModelConfig, TrainConfig
from hiermpi.hierarchy.topology import Topology
from hiermpi.planning.drawing import describe, ranges, size, tree_lines
from hiermpi.planning.plan import MESSAGE_BYTES, plan, suggest

VECTOR = 4 * 858_880  # the default model with 256 tokens; every tensor is a multiple of a cache line


def planned(ranks, per_node=0, coordinators="compute", reduction="auto", batch=48):
    config = Config(
        train=TrainConfig(batch_size=batch), hierarchy=HierarchyConfig(coordinators=coordinators, reduction=reduction)
    )
    topology = Topology(ranks, 12, per_node, coordinators=coordinators)
    return plan(topology, config, 256), topology, config


@pytest.mark.parametrize("ranks", [1, 2, 13, 14, 64, 1000])
def test_every_rank_is_drawn_once(ranks):
    found, _, _ = planned(ranks)
    drawn = [0] + [r for g in found["groups"] for r in (g["control"], *g["workers"])]
    assert sorted(drawn) == list(range(ranks))
    assert found["roots"] + found["controls"] + found["workers"] == ranks
    tree = [line for line in tree_lines(found) if line.startswith(("├", "└"))]
    assert len(tree) == found["controls"]
    if ranks <= 64:
        assert sum(line.count("●") for line in tree) == found["workers"]
    assert max(map(len, tree), default=0) < 120


def test_dedicated_ranks_are_hollow():
    found, _, _ = planned(27, coordinators="dedicated")
    text = describe(found)
    assert text.count("◇") == 12
    assert "□ root 0" in text
    assert found["leaves"] == 14


def test_bytes_go_where_the_reduction_sends_them():
    tree, _, _ = planned(64, 16, reduction="tree")
    assert tree["bytes_per_step"] == {
        **dict.fromkeys(("control_up", "control_down"), 12 * VECTOR),
        **dict.fromkeys(("group_up", "group_down"), 51 * VECTOR),
    }
    shared, _, _ = planned(64, 16)
    assert shared["bytes_per_step"] == {"node_read": 64 * VECTOR, "nodes_up": 3 * VECTOR, "nodes_down": 3 * VECTOR}


def test_memory_counts_what_a_rank_holds():
    shared, _, _ = planned(4, reduction="shared")
    tree, _, _ = planned(4, reduction="tree")
    flat, _, _ = planned(4, reduction="flat")
    # One copy of parameters and sum for four ranks, and each pays for half of what another sums of its gradient.
    assert flat["memory_bytes"]["control"] - shared["memory_bytes"]["control"] == pytest.approx(VECTOR // 2, rel=0.05)
    assert flat["memory_bytes"]["node"] - shared["memory_bytes"]["node"] == pytest.approx(2 * VECTOR, abs=1000)
    assert tree["memory_bytes"]["control"] - flat["memory_bytes"]["control"] == MESSAGE_BYTES
    more, _, _ = planned(4, reduction="shared", batch=4)
    assert more["memory_bytes"]["control"] < shared["memory_bytes"]["control"]
    large, _, _ = planned(64, reduction="shared", batch=64)  # owners touch every rank's gradient, workers their own
    owned = VECTOR / 13
    reading = large["memory_bytes"]["control"] - large["memory_bytes"]["worker"] - 2 * owned
    assert reading == pytest.approx((63 * owned + owned) / 2 + owned, rel=0.05)
    alone, _, _ = planned(1)
    owned = 2 * VECTOR  # both moments, all at one rank or shared out
    assert tree["memory_bytes"]["root"] - tree["memory_bytes"]["control"] == pytest.approx(27_000_000, abs=8 * 4096 * 4)
    assert alone["memory_bytes"]["root"] > 27_000_000 + VECTOR + owned


def test_suggestions():
    found, topology, config = planned(64)
    batch, threads = suggest(topology, config, found, 64)
    assert (batch.setting, batch.value) == ("train.batch_size", 128)
    assert (threads.setting, threads.value) == ("run.threads_per_rank", 1)
    assert suggest(topology, config, found, 256)[1].value == 4
    assert "start at most 2" in suggest(topology, config, found, 2)[1].why
    small = Config(model=ModelConfig(context_length=16), train=TrainConfig(batch_size=5))
    assert suggest(Topology(2), small, plan(Topology(2), small, 256), 2)[0].value == 64  # 512 tokens for each


def test_command(capsys):
    assert main(["plan", "--ranks", "64", "--suggest", "--cores-per-node", "64"]) == 0
    assert "--train.batch_size 128" in capsys.readouterr().out
    assert main(["plan", "--ranks", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suggestions"] == []
    assert main(["plan", "--ranks", "0"]) == 2


def test_words():
    assert ranges([2, 3, 4, 9]) == "2-4, 9"
    assert (size(999), size(1_250_000), size(12_345_678_901)) == ("999 B", "1.2 MB", "12.3 GB")
