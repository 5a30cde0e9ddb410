"""What a step will take, from what ``hiermpi bench reduce`` measured of a machine.

A step is computing, summing, optimizing and what the ranks spend on each other. Where a node has a core for each of
its ranks, the slowest rank counts; where ranks share cores, all their work, divided by the cores. Messages between
nodes are taken to cost what they cost inside the node that was measured: on a slower network sums take longer.
"""

import dataclasses
import heapq
import json
import os
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hiermpi.config.schema import Config, ModelConfig
from hiermpi.errors import UsageError
from hiermpi.files import told, write_bytes, write_whole
from hiermpi.hierarchy.topology import Topology, compute_slots
from hiermpi.model.contract import figure_of, load_family, specs_of
from hiermpi.model.parameters import ParameterLayout
from hiermpi.optimizer.sums import sequences_at_once, summed_type
from hiermpi.planning.plan import owned_elements, planned_ownership, shares_memory

MOST_SEQUENCES = 4096
"""Per leaf, up to which thresholds are looked for."""
UTILISATION = 0.95
ROOT_TO_WORKER = 40.0


class Line(NamedTuple):
    """Seconds of a sum and a broadcast: ``latency + bytes / rate``."""

    latency: float
    rate: float
    """Bytes that cross between ranks, up and down, a second."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured of one node."""

    host: str
    date: str
    cores: int
    """Usable ones of a node."""
    ranks: int
    """With which it was measured."""
    token_flops: float
    """Of a token of the model that was measured, as the model's family counts them; 0 where it does not."""
    token_seconds: float
    """Of computing a token of it on one core, all cores being busy."""
    call_seconds: float
    """Of a micro-batch besides its tokens."""
    sum_rate: float
    """Bytes a second that the node's cores together read and write in summing gradients in memory."""
    optimize_seconds: float
    """Of norm and AdamW per parameter on one core."""
    batch_seconds: float
    """Of the root's preparing a sequence."""
    overhead_seconds: float
    """Of a step besides all this."""
    crowded_overhead_seconds: float
    """More of it for each rank, on one core, where ranks share cores and take turns."""
    root_seconds: float
    """CPU of the root a step for everything but computing and preparing sequences, at ``ranks``."""
    tree: Line
    flat: Line

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"tree": self.tree, "flat": self.flat}, indent=1) + "\n"


def machine_from_json(text: str | bytes) -> Machine:
    """A machine as :meth:`Machine.to_json` wrote it. Raises ValueError that names what is wrong."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Machine):
        value = found.get(field.name)
        if field.type is Line:
            if not (isinstance(value, list) and len(value) == 2 and all(_is_amount(x) for x in value)):
                raise ValueError(f"{field.name} is not two numbers")
            values[field.name] = Line(*value)
        elif field.type is str:
            values[field.name] = str(value)
        elif not isinstance(value, int | float) or not _is_amount(value) or (field.type is int and value < 1):
            raise ValueError(f"{field.name} is not a positive number")
        else:
            values[field.name] = value
    return Machine(**values)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


def default_path() -> Path:
    """In the user's configuration folder (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hiermpi" / "machine.json"


def keep_machine(path: Path, machine: Machine) -> None:
    """Write the file, and the folder it is in. Raises UserError."""
    with told(path.parent, "make the folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda descriptor: write_bytes(descriptor, machine.to_json().encode()))


def read_machine(path: Path | None) -> Machine | None:
    """The machine in ``path``; by default in :func:`default_path`, None where that is not there. Raises UserError."""
    place = path or default_path()
    if path is None and not place.exists():
        return None
    with told(place, "read"):
        text = place.read_bytes()
    try:
        return machine_from_json(text)
    except ValueError as error:
        raise UsageError(
            f"{place} is not what hiermpi bench reduce wrote ({error}): measure again, or name another with --machine"
        ) from None


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
    return figure_of(load_family(model.family), "flops_per_token", model)


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
