"""What a topology and a configuration amount to: roles, loads, memory, bytes per step. Arithmetic only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hiermpi.config.schema import Config
from hiermpi.hierarchy.topology import Role, Topology
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.transformer import activation_bytes, transformer_specs

PROCESS_BYTES = 50_000_000
"""Interpreter, numpy and MPI of one rank, about."""


def plan(topology: Topology, config: Config, vocab_size: int) -> dict[str, Any]:
    """The plan as plain data, the form that ``--json`` prints.

    Args:
        topology: the ranks.
        config: resolved.
        vocab_size: rows of the token table.
    """
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    specs = transformer_specs(model)
    vector_bytes = 4 * ParameterLayout(specs).size
    n_leaves = topology.n_leaves
    most = -(-config.train.batch_size // n_leaves)
    activations = activation_bytes(model, min(most, config.train.micro_batch_size or most))
    roles = [topology.role(rank) for rank in range(topology.size)]

    def memory(rank: int) -> int:
        vectors = 4 if rank == 0 else 2  # the root also holds both moments
        return PROCESS_BYTES + vectors * vector_bytes + (activations if topology.is_leaf(rank) else 0)

    per_rank = [memory(rank) for rank in range(topology.size)]
    per_node = [0] * topology.n_nodes
    for rank, node in enumerate(topology.nodes):
        per_node[node] += per_rank[rank]
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
                "nodes": sorted({topology.nodes[rank] for rank in members}),
            }
            for index, members in enumerate(topology.groups)
        ],
        "root_computes": topology.is_leaf(0),
        "parameters": sum(spec.size for spec in specs),
        "vocab_size": vocab_size,
        "batch_size": config.train.batch_size,
        "sequences_per_leaf": {"least": config.train.batch_size // n_leaves, "most": most},
        "tokens_per_step": config.train.batch_size * model.context_length,
        "memory_bytes": {
            "root": per_rank[0],
            "control": max((per_rank[rank] for rank in topology.control_ranks), default=0),
            "worker": max((m for rank, m in enumerate(per_rank) if roles[rank] is Role.WORKER), default=0),
            "node": max(per_node),
        },
        "bytes_per_step": {
            "control_up": vector_bytes * len(topology.groups),
            "control_down": vector_bytes * len(topology.groups),
            "group_up": vector_bytes * roles.count(Role.WORKER),
            "group_down": vector_bytes * roles.count(Role.WORKER),
        },
    }


def describe(planned: dict[str, Any]) -> str:
    """The plan as a text for a person."""
    controls, workers = planned["controls"], planned["workers"]
    lines = [
        f"{count(planned['ranks'], 'rank')} on {count(planned['nodes'], 'node')}: 1 root, "
        f"{count(controls, 'control rank')}, {count(workers, 'worker')}; {planned['leaves']} compute "
        f"(coordinators: {planned['coordinators']})",
        "",
        f"root 0{'' if planned['root_computes'] else '  (coordinates only)'}",
    ]
    for entry in planned["groups"]:
        last = entry is planned["groups"][-1]
        below = f"workers {ranges(entry['workers'])}" if entry["workers"] else "no workers"
        lines.append(
            f"{'└' if last else '├'}─ group {entry['group']:<3} control {entry['control']:<5} {below:<20} "
            f"classes {ranges(entry['classes'])}"
            + (f"  nodes {ranges(entry['nodes'])}" if planned["nodes"] > 1 else "")
        )
    load, memory, moved = planned["sequences_per_leaf"], planned["memory_bytes"], planned["bytes_per_step"]
    lines += [
        "",
        f"{'parameters':22}{planned['parameters']:,} (vocabulary {planned['vocab_size']:,})",
        f"{'batch':22}{planned['batch_size']} sequences, {planned['tokens_per_step']:,} tokens a step",
        f"{'sequences per leaf':22}{load['least']} to {load['most']}"
        + ("" if load["least"] else "  (some leaves have nothing to do: raise train.batch_size)"),
        f"{'memory per rank':22}root {size(memory['root'])}"
        + (f", control {size(memory['control'])}" if controls else "")
        + (f", worker {size(memory['worker'])}" if workers else ""),
        f"{'memory per node':22}{size(memory['node'])}",
    ]
    if controls:
        lines.append(f"{'per step, control':22}{size(moved['control_up'])} up, {size(moved['control_down'])} down")
    if workers:
        lines.append(f"{'per step, groups':22}{size(moved['group_up'])} up, {size(moved['group_down'])} down")
    return "\n".join(lines)


def count(n: int, thing: str) -> str:
    """``n`` things, in words that agree."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted integers, runs shortened: ``2-6, 9``."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def size(n_bytes: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
