"""What a step will take, from what ``hiermpi bench reduce`` measured of a machine.

A step is computing, summing, optimizing and what the ranks spend on each other. Where a node has a core for each of
its ranks, the slowest rank counts; where ranks share cores, all their work, divided by the cores. Messages between
nodes are taken to cost what they cost inside the node that was measured: on a slower network sums take longer.
"""

import dataclasses
import heapq
from collections.abc import Callable
from math import ceil, log2
from typing import Any, NamedTuple

import numpy as np

from hiermpi.config.schema import Config, ModelConfig
from hiermpi.hierarchy.topology import Topology, compute_slots
from hiermpi.model.contract import load_family, specs_of
from hiermpi.model.parameters import ParameterLayout
from hiermpi.optimizer.sums import sequences_at_once, summed_type
from hiermpi.planning.machine import Machine
from hiermpi.planning.memory import owned_elements, planned_ownership, shares_memory

MOST_SEQUENCES = 4096
"""Per leaf, up to which thresholds are looked for."""
UTILISATION = 0.95
ROOT_TO_WORKER = 40.0


class Prediction(NamedTuple):
    """Of one step."""

    step_seconds: float
    compute: float
    reduce: float
    optimize: float
    other: float
    tokens_per_second: float
    utilisation: float
    """Core seconds that compute gradients, of all there are."""
    root_to_worker: float
    """CPU of a worker's computing to that of the root's coordinating."""


def predict(machine: Machine, topology: Topology, config: Config, model: ModelConfig) -> Prediction:
    """A step of ``model`` with the batch of ``config``.

    Args:
        machine: of which every node is one.
        topology: the ranks.
        config: resolved.
        model: with the vocabulary size.
    """
    layout = ParameterLayout(specs_of(load_family(model.family), model))
    batch, leaves, cores = config.train.batch_size, topology.n_leaves, machine.cores
    nodes = topology.ranks_of_node
    ranks, computing = max(map(len, nodes)), max(topology.leaves_of_node)
    crowded = ranks > cores
    busy = min(leaves, batch)
    alone = leaf_seconds(machine, config, model, batch / busy)
    preparing = batch * machine.batch_seconds
    overhead = machine.overhead_seconds if topology.size > 1 else 0.0
    if crowded:
        each, more = divmod(batch, leaves)
        here = round(more * computing / leaves)
        shorter, longer = (leaf_seconds(machine, config, model, share) for share in (each, each + 1))
        taken = [longer] * here + [shorter] * (computing - here)
        in_turns = compute_slots(computing, cores) == cores
        compute = (_in_turns(taken, cores) if in_turns else sum(taken) / cores) + preparing / cores
        overhead += machine.crowded_overhead_seconds * ranks / cores
    else:
        slowest = leaf_seconds(machine, config, model, ceil(batch / leaves))
        compute = slowest + preparing if topology.is_leaf(0) else max(slowest, preparing)
    reduce = _sum_seconds(machine, topology, config, 4 * layout.size, ranks, computing)
    share = _largest_share(topology, config, model, layout)
    spread = max(share, 1 / min(cores, ranks)) if share < 1 else 1.0
    optimize = machine.optimize_seconds * layout.size * spread
    step = compute + reduce + optimize + overhead
    used = sum(min(cores, len(node)) for node in nodes)
    root = preparing + machine.root_seconds + (machine.optimize_seconds * layout.size if share == 1 else 0.0)
    return Prediction(
        step,
        compute,
        reduce,
        optimize,
        overhead,
        batch * model.context_length / step,
        min(1.0, busy * alone / (step * used)),
        alone / root if topology.size > 1 else 0.0,
    )


def _in_turns(seconds: list[float], cores: int) -> float:
    """When the last of these is done, each on the core that is free first, the longest first."""
    ends = [0.0] * cores
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def leaf_seconds(machine: Machine, config: Config, model: ModelConfig, sequences: float) -> float:
    """Seconds that a core computes on ``sequences``."""
    calls = max(1.0, sequences / sequences_at_once(config)) if sequences else 0.0
    seconds = machine.token_seconds * token_flops(model) / machine.token_flops
    return calls * machine.call_seconds + sequences * model.context_length * seconds


def token_flops(model: ModelConfig) -> float:
    """The operations of a token, as the model's family counts them; 0 where it does not."""
    counted = getattr(load_family(model.family), "flops_per_token", None)
    return counted(model) if counted else 0.0


def _sum_seconds(
    machine: Machine, topology: Topology, config: Config, vector_bytes: int, ranks: int, computing: int
) -> float:
    if topology.size == 1:
        return 0.0
    width = np.dtype(summed_type(config)).itemsize // 4
    crossing = vector_bytes * (width + 1) / 2
    if not shares_memory(topology, config):
        line = machine.flat if config.hierarchy.reduction == "flat" else machine.tree
        return line.latency * topology.size / machine.ranks + crossing * 2 * (topology.size - 1) / line.rate
    busy = min(ranks, machine.cores) / machine.cores
    inside = vector_bytes * width * (computing + 1) / (machine.sum_rate * busy)
    if topology.n_nodes == 1:
        return inside
    hops = ceil(log2(topology.n_nodes))
    latency = machine.tree.latency / max(1, ceil(log2(machine.ranks)))
    return inside + hops * (latency + 2 * crossing / machine.tree.rate)


def _largest_share(topology: Topology, config: Config, model: ModelConfig, layout: ParameterLayout) -> float:
    """The part of the vector that the owner of most owns."""
    owned = owned_elements(planned_ownership(topology, config, model))
    return max(owned.values()) / layout.size


def fewest_tokens(
    machine: Machine, topology: Topology, config: Config, model: ModelConfig, enough: Callable[[Prediction], bool]
) -> int | None:
    """Fewest tokens per leaf and step from which on ``enough`` holds; None where no batch is large enough."""

    def holds(sequences: int) -> bool:
        batch = sequences * topology.n_leaves
        larger = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
        return enough(predict(machine, topology, larger, model))

    if not holds(MOST_SEQUENCES):
        return None
    low, high = 0, MOST_SEQUENCES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high * model.context_length


def forecast(machine: Machine, topology: Topology, config: Config, vocab_size: int) -> dict[str, Any]:
    """What ``plan`` prints of a prediction, as plain data; empty where the model's family counts no operations."""
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    if not token_flops(model) or not machine.token_flops:
        return {}
    found = predict(machine, topology, config, model)
    single = predict(machine, Topology(1, topology.symmetry_order), config, model)
    return {
        **found._asdict(),
        "speed_up": single.step_seconds / found.step_seconds,
        "tokens_for_utilisation": fewest_tokens(
            machine, topology, config, model, lambda p: p.utilisation >= UTILISATION
        ),
        "tokens_for_root_to_worker": fewest_tokens(
            machine, topology, config, model, lambda p: p.root_to_worker >= ROOT_TO_WORKER
        ),
        "machine": {"host": machine.host, "date": machine.date, "cores": machine.cores, "ranks": machine.ranks},
    }
