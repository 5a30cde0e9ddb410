"""The plan gives roles, loads, memory and bytes per step as plain data, before a job is submitted.

The memory of ranks and nodes is the proportional set size (Pss in Linux's smaps_rollup) between two checkpoints. The
figures of a process were measured on Debian 12 with CPython 3.11, numpy 2.4 and Open MPI 5.0; vectors are counted from
the shapes.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from hiermpi.config.registry import REDUCTIONS, SHARING_REDUCTIONS, is_outside
from hiermpi.config.schema import Config, ModelConfig, listed
from hiermpi.hierarchy.ownership import Ownership, summing
from hiermpi.hierarchy.topology import Role, Topology, compute_slots
from hiermpi.model.contract import figure_of, load_family, specs_of
from hiermpi.model.parameters import ParameterLayout, SymmetryTable, symmetry_groups
from hiermpi.optimizer.rules import load_rule, require_fit
from hiermpi.optimizer.sums import sequences_at_once, summed_type
from hiermpi.optimizer.update import ownership_of, slots_of

FEWEST_TOKENS = 512
"""The fewest tokens per leaf and step to suggest; with fewer, products are too small and the messages dominate."""
FIGURES = ("flops_per_token", "workspace_bytes")
"""The optional functions of a family that give figures of the plan."""
MOST_TOKENS = 2048
"""The most tokens per leaf and step to suggest; more tokens gain little."""


def plan(
    topology: Topology, config: Config, vocab_size: int, data_bytes: int = 0, cores: int = 1
) -> dict[str, Any]:
    """Return the plan in the form that ``--json`` prints.

    Args:
        topology: The topology of the ranks.
        config: The resolved configuration.
        vocab_size: The number of rows of the token table.
        data_bytes: The size in bytes of the tokens that the root keeps in memory.
        cores: The number of cores of a node.
    """
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    family = load_family(model.family)
    specs = specs_of(family, model)
    vector_bytes = 4 * ParameterLayout(specs).size
    n_leaves = topology.n_leaves
    roles = [topology.role(rank) for rank in range(topology.size)]
    owned = owned_elements(planned_ownership(topology, config, model))
    memory = memory_of(topology, config, model, data_bytes, cores)
    workers = [size for size, role in zip(memory.per_rank, roles, strict=True) if role is Role.WORKER]
    return {
        "ranks": topology.size,
        "nodes": topology.n_nodes,
        "coordinators": topology.coordinators,
        "roots": roles.count(Role.ROOT),
        "controls": roles.count(Role.CONTROL),
        "workers": roles.count(Role.WORKER),
        "leaves": n_leaves,
        "groups": [
            {
                "group": index,
                "control": members[0],
                "workers": list(members[1:]),
                "leaves": [rank for rank in members if topology.is_leaf(rank)],
                "classes": [c for c, group in enumerate(topology.group_of_class) if group == index],
                "owned_parameters": owned.get(members[0], 0),
                "nodes": sorted({topology.nodes[rank] for rank in members}),
            }
            for index, members in enumerate(topology.groups)
        ],
        "root_owns": owned[0],
        "root_computes": topology.is_leaf(0),
        "parameters": sum(spec.size for spec in specs),
        "vocab_size": vocab_size,
        "family": model.family,
        "not_given": [name for name in FIGURES if not hasattr(family, name)],
        "batch_size": config.train.batch_size,
        "sequences_per_leaf": {
            "least": config.train.batch_size // n_leaves,
            "most": -(-config.train.batch_size // n_leaves),
        },
        "tokens_per_step": config.train.batch_size * model.context_length,
        "memory_bytes": {
            "root": memory.per_rank[0],
            "control": max((memory.per_rank[rank] for rank in topology.control_ranks), default=0),
            "worker": max(workers, default=0),
            "node": max(memory.per_node),
            "root_while_saving": memory.per_rank[0] + memory.saving,
        },
        "shared_memory": shares_memory(topology, config),
        "bytes_per_step": bytes_per_step(topology, vector_bytes, shares_memory(topology, config)),
    }


def bytes_per_step(topology: Topology, vector_bytes: int, shared: bool) -> dict[str, int]:
    """Return the bytes of gradients that go up each level in a step, and of parameters that come down.

    In node-shared memory no message is sent inside a node: its ranks read each other's gradients there.

    Args:
        topology: The topology of the ranks.
        vector_bytes: The size of the parameter vector in bytes.
        shared: Whether gradients and parameters lie in node-shared memory.
    """
    controls, nodes = len(topology.groups), topology.n_nodes
    workers = topology.size - 1 - controls
    if shared:
        return {
            "node_read": vector_bytes * topology.size,
            "nodes_up": vector_bytes * (nodes - 1),
            "nodes_down": vector_bytes * (nodes - 1),
        }
    return {
        "control_up": vector_bytes * controls,
        "control_down": vector_bytes * controls,
        "group_up": vector_bytes * workers,
        "group_down": vector_bytes * workers,
    }


class Suggestion(NamedTuple):
    """A suggested value of a setting, with the reason."""

    setting: str
    value: int
    why: str


def suggest(topology: Topology, config: Config, planned: dict[str, Any], cores: int) -> list[Suggestion]:
    """Return settings that suit these ranks.

    Args:
        topology: The topology of the ranks.
        config: The resolved configuration.
        planned: The result of :func:`plan`.
        cores: The number of cores of a node.
    """
    length, leaves = config.model.context_length, topology.n_leaves
    fewest, most = -(-FEWEST_TOKENS // length), max(1, MOST_TOKENS // length)
    each = min(max(round(config.train.batch_size / leaves), fewest), max(most, fewest))
    batch = each * leaves
    crowded = max(sum(node == other for other in topology.nodes) for node in range(topology.n_nodes))
    threads = max(1, cores // crowded)
    why = f"{each} sequences, {each * length:,} tokens, for each of {leaves} leaves"
    if config.train.batch_size < leaves:
        why += f" ({config.train.batch_size} feeds only {config.train.batch_size} of them)"
    elif config.train.batch_size % leaves:
        why += f" ({config.train.batch_size} does not divide evenly)"
    found = [Suggestion("train.batch_size", batch, why)]
    what = f"{crowded} ranks share a node's {cores} cores"
    if threads > 1:
        what += ": more ranks of one thread are faster while the batch can feed them"
    elif crowded > cores:
        what += f": start at most {cores} on a node"
    return [*found, Suggestion("run.threads_per_rank", threads, what)]


PROCESS_BYTES = 27_200_000
"""The private memory in bytes of the interpreter, numpy and MPI in a rank."""
LIBRARY_BYTES = 20_600_000
"""The size in bytes of the pages of libraries, which all ranks of a node share."""
ROOT_BYTES = 27_000_000
"""The memory in bytes of what the root loads besides: HDF5, the validation of settings and the router."""
MESSAGE_BYTES = 5_000_000
"""The memory in bytes that whole vectors sent in the tree cost the root and the control ranks: 4.5 to 6 MB."""
SAVING_VECTORS = 6
"""The vectors that the root holds while it saves: parameters and moments in token order, and the file built of them."""
GATHERED_VECTORS = 2
"""The number of further vectors that it holds where the moments lie with other owners."""


class Memory(NamedTuple):
    """The memory of ranks and nodes in bytes."""

    per_rank: list[int]
    """The proportional set size of each rank."""
    per_node: list[int]
    saving: int
    """The additional memory of the root while it writes a checkpoint."""


def memory_of(
    topology: Topology, config: Config, model: ModelConfig, data_bytes: int = 0, cores: int = 1
) -> Memory:
    """Compute the memory of every rank. The root computes the sequences that the groups leave over.

    Args:
        topology: The topology of the ranks.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
        data_bytes: The size in bytes of the tokens that the root keeps in memory.
        cores: The number of cores of a node.
    """
    layout = ParameterLayout(specs_of(load_family(model.family), model))
    vector = 4 * layout.size
    ownership = planned_ownership(topology, config, model)
    owned = owned_elements(ownership)
    batch, leaves = config.train.batch_size, topology.n_leaves
    most = -(-batch // leaves)
    roots = max(0, batch - most * (leaves - 1)) if config.hierarchy.routing == "balanced" or leaves == 1 else 0
    activations = {
        n: activations_of(model, min(n, sequences_at_once(config)))
        for n in {0, most, roots}
    }
    shared, slots = shares_memory(topology, config), slots_of(config)
    vectors_of_state = len(load_rule(config.optimizer.rule).state)
    parameters = slots * vector
    sums = np.dtype(summed_type(config)).itemsize * layout.size
    unit = vector if sums > vector else 0  # with fixed-point sums, a unit's gradient has a vector of its own
    summed = summed_parts(topology, ownership, sums // layout.size, cores) if shared else []
    cores_of_slots = max(1, cores // config.run.threads_per_rank)
    computing = [compute_slots(leaves, cores_of_slots) for leaves in topology.leaves_of_node]
    messages = topology.size > 1 and not shared and sends_vectors(config)

    def vectors(rank: int) -> int:
        """Return the bytes of gradient, sum and parameters; ranks that touch the same pages share them equally."""
        own = sums if topology.is_leaf(rank) else 0
        if not shared:
            return unit + sums + parameters
        node = topology.nodes[rank]
        part, others = summed[rank], sums * topology.leaves_of_node[node] - own
        gradients = own * part + own * (1 - part) / 2 + others * part / 2
        return unit + round(gradients + sums * part) + parameters // len(topology.ranks_of_node[node])

    def workspace(rank: int) -> int:
        """Return the bytes of a leaf's activations, or of its part of the compute slots' memory."""
        if not topology.is_leaf(rank):
            return 0
        own = activations[roots if rank == 0 else most]
        node = topology.nodes[rank]
        return own * computing[node] // topology.leaves_of_node[node]

    def of(rank: int) -> int:
        process = PROCESS_BYTES + LIBRARY_BYTES // len(topology.ranks_of_node[topology.nodes[rank]])
        root = ROOT_BYTES + data_bytes if rank == 0 else 0
        moments = 4 * vectors_of_state * slots * owned.get(rank, 0)
        exchanged = MESSAGE_BYTES if messages and topology.role(rank) is not Role.WORKER else 0
        return process + root + vectors(rank) + moments + workspace(rank) + exchanged

    per_rank = [of(rank) for rank in range(topology.size)]
    per_node = [0] * topology.n_nodes
    for rank, node in enumerate(topology.nodes):
        per_node[node] += per_rank[rank]
    saving = SAVING_VECTORS + (GATHERED_VECTORS if ownership.shared_out else 0)
    return Memory(per_rank, per_node, saving * vector)


def activations_of(model: ModelConfig, sequences: int) -> int:
    """Return the bytes of a leaf that computes ``sequences`` at once; 0 where the family does not count them."""
    return int(figure_of(load_family(model.family), "workspace_bytes", model, sequences)) if sequences else 0


def summed_parts(topology: Topology, ownership: Ownership, width: int, cores: int) -> list[float]:
    """Return the part of the vector that each rank sums over its node's gradients, as a fraction.

    Args:
        topology: The topology of the ranks.
        ownership: The owners of the parts of the vector.
        width: The size of a summed element in bytes.
        cores: The number of cores of a node.
    """
    parts = [0.0] * topology.size
    sizes = np.diff(ownership.bounds) / ownership.size
    for node, here in enumerate(topology.ranks_of_node):
        by = summing(ownership, topology, node, width, cores)
        for place, part in enumerate(np.bincount(by, sizes, minlength=len(here))):
            parts[here[place]] = float(part)
    return parts


def shares_memory(topology: Topology, config: Config) -> bool:
    """Return whether gradients and parameters lie in memory that the ranks of a node share.

    An automatic choice is assumed to take a reduction that shares memory, where one is named and several ranks are on a
    node.
    """
    names = listed(config.hierarchy.reduction)
    named = [name for entry in names for name in (REDUCTIONS if entry == "auto" else [entry])]
    sharing = [name for name in named if name in SHARING_REDUCTIONS]
    return bool(sharing) and (len(named) == 1 or topology.n_nodes < topology.size)


def sends_vectors(config: Config) -> bool:
    """Return whether ranks keep memory for messages of whole vectors, as all reductions but one library call do."""
    return config.hierarchy.reduction != "flat" and not is_outside(config.hierarchy.reduction)


def planned_ownership(topology: Topology, config: Config, model: ModelConfig) -> Ownership:
    """Return the ownership under ``optimizer.placement``, where classes are the token ids modulo the order.

    Args:
        topology: The topology of the ranks.
        config: The resolved configuration.
        model: The model's settings with the vocabulary size.
    """
    groups = symmetry_groups(None, model.vocab_size, model.symmetry_order)
    class_bounds = SymmetryTable(groups, model.symmetry_order).class_bounds
    specs, rule = specs_of(load_family(model.family), model), load_rule(config.optimizer.rule)
    require_fit(rule, config.optimizer.rule, specs)
    return ownership_of(config, topology, ParameterLayout(specs), class_bounds, rule)


def owned_elements(ownership: Ownership) -> dict[int, int]:
    """Return the number of elements of the vector that each possible owner, by world rank, owns."""
    owned = dict.fromkeys(ownership.ranks, 0)
    for start, stop, owner in ownership.spans:
        owned[ownership.ranks[owner]] += stop - start
    return owned
