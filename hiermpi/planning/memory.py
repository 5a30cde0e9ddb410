"""Memory of ranks and nodes, as proportional set size (what Linux's smaps_rollup says as Pss) between two checkpoints.

The figures of a process were measured on Debian 12 with CPython 3.11, numpy 2.4 and Open MPI 5.0; vectors and
activations are counted from the shapes.
"""

from typing import NamedTuple

import numpy as np

from hiermpi.config.schema import Config, ModelConfig
from hiermpi.hierarchy.ownership import Ownership, summing
from hiermpi.hierarchy.topology import Role, Topology, compute_slots
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.transformer import transformer_specs
from hiermpi.model.workspace import activation_bytes, micro_batch_sequences
from hiermpi.optimizer.slots import slots_of
from hiermpi.optimizer.sums import unit_sequences
from hiermpi.planning.owners import owned_elements, planned_ownership

PROCESS_BYTES = 27_200_000
"""What the interpreter, numpy and MPI of a rank have to themselves."""
LIBRARY_BYTES = 20_600_000
"""Pages of libraries, which all ranks of a node share."""
ROOT_BYTES = 27_000_000
"""What the root loads besides: HDF5, the validation of settings, the router."""
MESSAGE_BYTES = 5_000_000
"""What the root and the control ranks keep of sending each other whole vectors in the tree: 4.5 to 6 MB."""
SAVING_VECTORS = 6
"""Vectors that the root holds while it saves: parameters and moments in token order, and the file built of them."""
GATHERED_VECTORS = 2
"""Vectors more where the moments lie with other owners."""


class Memory(NamedTuple):
    """Bytes."""

    per_rank: list[int]
    """Proportional set size of each rank."""
    per_node: list[int]
    saving: int
    """What the root takes besides while it writes a checkpoint."""


def memory_of(
    topology: Topology, config: Config, model: ModelConfig, data_bytes: int = 0, cores: int = 1
) -> Memory:
    """The memory of every rank. The root computes what the groups leave over.

    Args:
        topology: the ranks.
        config: resolved.
        model: with the vocabulary size.
        data_bytes: tokens that the root keeps in memory.
        cores: of a node.
    """
    layout = ParameterLayout(transformer_specs(model))
    vector = 4 * layout.size
    ownership = planned_ownership(topology, config, model)
    owned = owned_elements(ownership)
    batch, leaves = config.train.batch_size, topology.n_leaves
    most = -(-batch // leaves)
    roots = max(0, batch - most * (leaves - 1)) if config.hierarchy.routing == "balanced" or leaves == 1 else 0
    if config.hierarchy.reproducible:
        most, roots = (min(n, unit_sequences(config)) for n in (most, roots))
    activations = {
        n: activations_of(model, min(n, micro_batch_sequences(model, config.train.micro_batch_size)))
        for n in {0, most, roots}
    }
    shared, slots = shares_memory(topology, config), slots_of(config)
    parameters = slots * vector
    # Sums in fixed point are twice as long, and the gradient of a unit stands beside them.
    sums, unit = (2 * vector, vector) if config.hierarchy.reproducible else (vector, 0)
    summed = summed_parts(topology, ownership, sums // layout.size, cores) if shared else []
    cores_of_slots = max(1, cores // config.run.threads_per_rank)
    computing = [compute_slots(leaves, cores_of_slots) for leaves in topology.leaves_of_node]
    messages = topology.size > 1 and not shared and config.hierarchy.reduction != "flat"

    def vectors(rank: int) -> int:
        """Gradient, sum and parameters. Pages that several ranks touch are theirs in equal parts."""
        own = sums if topology.is_leaf(rank) else 0
        if not shared:
            return unit + sums + parameters
        node = topology.nodes[rank]
        part, others = summed[rank], sums * topology.leaves_of_node[node] - own
        gradients = own * part + own * (1 - part) / 2 + others * part / 2
        return unit + round(gradients + sums * part) + parameters // len(topology.ranks_of_node[node])

    def workspace(rank: int) -> int:
        """Activations of a leaf, or its part of those that belong to turns."""
        if not topology.is_leaf(rank):
            return 0
        own = activations[roots if rank == 0 else most]
        node = topology.nodes[rank]
        return own * computing[node] // topology.leaves_of_node[node]

    def of(rank: int) -> int:
        process = PROCESS_BYTES + LIBRARY_BYTES // len(topology.ranks_of_node[topology.nodes[rank]])
        root = ROOT_BYTES + data_bytes if rank == 0 else 0
        moments = 8 * slots * owned.get(rank, 0)
        exchanged = MESSAGE_BYTES if messages and topology.role(rank) is not Role.WORKER else 0
        return process + root + vectors(rank) + moments + workspace(rank) + exchanged

    per_rank = [of(rank) for rank in range(topology.size)]
    per_node = [0] * topology.n_nodes
    for rank, node in enumerate(topology.nodes):
        per_node[node] += per_rank[rank]
    saving = SAVING_VECTORS + (GATHERED_VECTORS if ownership.shared_out else 0)
    return Memory(per_rank, per_node, saving * vector)


def activations_of(model: ModelConfig, sequences: int) -> int:
    """Bytes of the buffers of a leaf that computes ``sequences`` at once; none where it never computes."""
    return activation_bytes(model, sequences) if sequences else 0


def summed_parts(topology: Topology, ownership: Ownership, width: int, cores: int) -> list[float]:
    """The part of the vector that each rank sums over its node's gradients."""
    parts = [0.0] * topology.size
    sizes = np.diff(ownership.bounds) / ownership.size
    for node, here in enumerate(topology.ranks_of_node):
        by = summing(ownership, topology, node, width, cores)
        for place, part in enumerate(np.bincount(by, sizes, minlength=len(here))):
            parts[here[place]] = float(part)
    return parts


def shares_memory(topology: Topology, config: Config) -> bool:
    """Whether gradients and parameters lie in memory that the ranks of a node share."""
    chosen = config.hierarchy.reduction
    return chosen == "shared" or (chosen == "auto" and topology.n_nodes < topology.size)
