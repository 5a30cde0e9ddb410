"""Roles, loads, memory and bytes per step as plain data."""

import dataclasses
from typing import Any, NamedTuple

from hiermpi.config.schema import Config
from hiermpi.hierarchy.topology import Role, Topology
from hiermpi.model.contract import load_family, specs_of
from hiermpi.model.parameters import ParameterLayout
from hiermpi.planning.memory import memory_of, owned_elements, planned_ownership, shares_memory

FEWEST_TOKENS = 512
"""Per leaf and step: below, the products are too small and the exchange weighs too much."""
FIGURES = ("flops_per_token", "workspace_bytes")
"""What a family may say of itself, for figures of the plan."""
MOST_TOKENS = 2048
"""Per leaf and step that are suggested: above, there is little left to gain."""


def plan(
    topology: Topology, config: Config, vocab_size: int, data_bytes: int = 0, cores: int = 1
) -> dict[str, Any]:
    """The plan in the form that ``--json`` prints.

    Args:
        topology: the ranks.
        config: resolved.
        vocab_size: rows of the token table.
        data_bytes: tokens that the root keeps in memory.
        cores: of a node.
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
    """Bytes of gradients that go up each level in a step, and of parameters that come down.

    In node-shared memory nothing is sent inside a node: its ranks read each other's gradients there.
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
    """A setting, its value, and why."""

    setting: str
    value: int
    why: str


def suggest(topology: Topology, config: Config, planned: dict[str, Any], cores: int) -> list[Suggestion]:
    """Settings for these ranks.

    Args:
        topology: the ranks.
        config: resolved.
        planned: see :func:`plan`.
        cores: of a node.
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
