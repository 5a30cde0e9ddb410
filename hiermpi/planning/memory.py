"""Memory of ranks and nodes, as proportional set size (what Linux's smaps_rollup says as Pss) between two checkpoints.

The figures of a process were measured on Debian 12 with CPython 3.11, numpy 2.4 and Open MPI 5.0; vectors and
activations are counted from the shapes.
"""

from typing import NamedTuple

from hiermpi.config.schema import Config, ModelConfig
from hiermpi.hierarchy.topology import Topology
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.transformer import activation_bytes, micro_batch_sequences, transformer_specs
from hiermpi.optimizer.fixed_point import unit_sequences
from hiermpi.optimizer.slots import slots_of
from hiermpi.planning.owners import owned_elements, planned_ownership

PROCESS_BYTES = 27_200_000
"""What the interpreter, numpy and MPI of a rank have to themselves."""
LIBRARY_BYTES = 20_600_000
"""Pages of libraries, which all ranks of a node share."""
ROOT_BYTES = 27_000_000
"""What the root loads besides: HDF5, the validation of settings, the router."""
MESSAGE_BYTES = 5_000_000
"""What a rank keeps of having sent whole vectors up the tree, as ``auto`` does when it times it: 4.7 to 6 MB."""
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


def memory_of(topology: Topology, config: Config, model: ModelConfig, data_bytes: int = 0) -> Memory:
    """The memory of every rank. The root computes what the groups leave over.

    Args:
        topology: the ranks.
        config: resolved.
        model: with the vocabulary size.
        data_bytes: tokens that the root keeps in memory.
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
    messages = MESSAGE_BYTES if topology.size > 1 and config.hierarchy.reduction in ("auto", "tree") else 0

    def of(rank: int) -> int:
        neighbours = len(topology.ranks_of_node[topology.nodes[rank]])
        # Shared: one copy of the parameters and one of the sum for all ranks of the node. Sums in fixed point are
        # twice as long, and the gradient of a unit stands beside them.
        sums, unit = (2 * vector, vector) if config.hierarchy.reproducible else (vector, 0)
        parameters = slots * vector
        own = unit + (sums if topology.is_leaf(rank) or not shared else 0)
        gradient_and_parameters = own + ((parameters + sums) // neighbours if shared else parameters)
        root = ROOT_BYTES + data_bytes if rank == 0 else 0
        leaf = activations[roots if rank == 0 else most] if topology.is_leaf(rank) else 0
        moments = 8 * slots * owned.get(rank, 0)
        own_process = PROCESS_BYTES + messages + LIBRARY_BYTES // neighbours
        return own_process + gradient_and_parameters + moments + leaf + root

    per_rank = [of(rank) for rank in range(topology.size)]
    per_node = [0] * topology.n_nodes
    for rank, node in enumerate(topology.nodes):
        per_node[node] += per_rank[rank]
    saving = SAVING_VECTORS + (GATHERED_VECTORS if ownership.shared_out else 0)
    return Memory(per_rank, per_node, saving * vector)


def activations_of(model: ModelConfig, sequences: int) -> int:
    """Bytes of the buffers of a leaf that computes ``sequences`` at once; none where it never computes."""
    return activation_bytes(model, sequences) if sequences else 0


def shares_memory(topology: Topology, config: Config) -> bool:
    """Whether gradients and parameters lie in memory that the ranks of a node share."""
    chosen = config.hierarchy.reduction
    return chosen == "shared" or (chosen == "auto" and topology.n_nodes < topology.size)
