"""The time of a step is predicted from what ``hiermpi bench reduce`` measured of a machine.

A step consists of computing, summing, optimizing and the overhead between ranks. Where a node has a core for each of
its ranks, the slowest rank decides; where ranks share cores, the sum of their work divided by the cores does. Messages
between nodes are assumed to cost what they cost inside the measured node: on a slower network sums take longer.
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
from hiermpi.files import file_errors, write_bytes, write_whole
from hiermpi.hierarchy.topology import Topology, compute_slots
from hiermpi.model.contract import figure_of, load_family, specs_of
from hiermpi.model.parameters import ParameterLayout
from hiermpi.optimizer.sums import sequences_at_once, summed_type
from hiermpi.planning.plan import owned_elements, planned_ownership, shares_memory

MOST_SEQUENCES = 4096
"""The number of sequences per leaf up to which thresholds are searched."""
UTILISATION = 0.95
ROOT_TO_WORKER = 40.0


class Line(NamedTuple):
    """The seconds of a sum and a broadcast as a line: ``latency + bytes / rate``."""

    latency: float
    rate: float
    """The rate, in bytes per second, of what crosses between ranks, up and down."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The figures that were measured on one node."""

    host: str
    date: str
    cores: int
    """The number of usable cores of a node."""
    ranks: int
    """The number of ranks of the measurement."""
    token_flops: float
    """The floating-point operations per token of the measured model, as its family counts them; 0 where it does not."""
    token_seconds: float
    """The seconds in which one core computes a token of that model, while all cores are busy."""
    call_seconds: float
    """The seconds that a micro-batch takes besides its tokens."""
    sum_rate: float
    """The rate, in bytes per second, at which a node's cores together read and write to sum gradients in memory."""
    optimize_seconds: float
    """The seconds of norm and AdamW per parameter on one core."""
    batch_seconds: float
    """The seconds in which the root prepares a sequence."""
    overhead_seconds: float
    """The seconds of a step besides all these."""
    crowded_overhead_seconds: float
    """The additional overhead in seconds per rank, on one core, where ranks share cores and use compute slots."""
    root_seconds: float
    """The root's CPU seconds per step for all but computing and preparing sequences, at ``ranks`` ranks."""
    tree: Line
    flat: Line

    def to_json(self) -> str:
        """Return the figures as a JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"tree": self.tree, "flat": self.flat}, indent=1) + "\n"


def machine_from_json(text: str | bytes) -> Machine:
    """Read a machine from the text of :meth:`Machine.to_json`. Raises ValueError that names what is wrong."""
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
    """Return the default file in the user's configuration folder (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hiermpi" / "machine.json"


def keep_machine(path: Path, machine: Machine) -> None:
    """Write the figures to ``path``, and make its folder where needed. Raises UserError."""
    with file_errors(path.parent, "make the folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda descriptor: write_bytes(descriptor, machine.to_json().encode()))


def read_machine(path: Path | None) -> Machine | None:
    """Read the machine in ``path``, by default in :func:`default_path`. Raises UserError.

    The result is None where no path is given and the default file does not exist.
    """
    place = path or default_path()
    if path is None and not place.exists():
        return None
    with file_errors(place, "read"):
        text = place.read_bytes()
    try:
        return machine_from_json(text)
    except ValueError as error:
        raise UsageError(
            f"{place} is not what hiermpi bench reduce wrote ({error}): measure again, or name another with --machine"
        ) from None


class Prediction(NamedTuple):
    """The predicted seconds of one step and of its parts."""

    step_seconds: float
    compute: float
    reduce: float
    optimize: float
    other: float
    tokens_per_second: float
    utilisation: float
    """The share of all core seconds that computes gradients."""
    root_to_worker: float
    """The CPU time of a worker's computing divided by that of the root's coordinating."""


def predict(machine: Machine, topology: Topology, config: Config, model: ModelConfig) -> Prediction:
    """Predict a step of ``model`` with the batch of ``config``.

    Args:
        machine: The figures of every node.
        topology: The topology of the ranks.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
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
    """Return the end of the last job, where each starts on the core that is free first, the longest jobs first."""
    ends = [0.0] * cores
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def leaf_seconds(machine: Machine, config: Config, model: ModelConfig, sequences: float) -> float:
    """Return the seconds in which a core computes ``sequences`` sequences.

    Args:
        machine: The figures of the node.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
        sequences: The number of sequences, which may be a mean.
    """
    calls = max(1.0, sequences / sequences_at_once(config)) if sequences else 0.0
    seconds = machine.token_seconds * token_flops(model) / machine.token_flops
    return calls * machine.call_seconds + sequences * model.context_length * seconds


def token_flops(model: ModelConfig) -> float:
    """Return the operations of a token as the model's family counts them, or 0 where it does not."""
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
    """Return the largest part of the vector that one owner has, as a fraction.

    Args:
        topology: The topology of the ranks.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
        layout: The layout of the model's parameters.
    """
    owned = owned_elements(planned_ownership(topology, config, model))
    return max(owned.values()) / layout.size


def fewest_tokens(
    machine: Machine, topology: Topology, config: Config, model: ModelConfig, enough: Callable[[Prediction], bool]
) -> int | None:
    """Return the fewest tokens per leaf and step from which on ``enough`` holds; None where no batch is large enough.

    Args:
        machine: The figures of every node.
        topology: The topology of the ranks.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
        enough: The condition on a prediction, which larger batches keep fulfilled.
    """

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
    """Return what ``plan`` prints of a prediction, as plain data.

    Args:
        machine: The figures of every node.
        topology: The topology of the ranks.
        config: The resolved configuration.
        vocab_size: The number of rows of the token table.

    Returns:
        The figures by name; the table is empty where the model's family counts no operations.
    """
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
