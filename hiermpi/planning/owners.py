"""Who would own what of a model's vector."""

from hiermpi.config.schema import Config, ModelConfig
from hiermpi.hierarchy.ownership import Ownership, assign
from hiermpi.hierarchy.topology import Topology
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.parameters import SymmetryTable, symmetry_groups
from hiermpi.model.transformer import transformer_specs
from hiermpi.optimizer.norm import norm_blocks


def planned_ownership(topology: Topology, config: Config, model: ModelConfig) -> Ownership:
    """The ownership under ``optimizer.placement``, the tokens' classes being their ids modulo the order.

    Args:
        topology: the ranks.
        config: resolved.
        model: with the vocabulary size.
    """
    groups = symmetry_groups(None, model.vocab_size, model.symmetry_order)
    class_bounds = SymmetryTable(groups, model.symmetry_order).class_bounds
    blocks = norm_blocks(ParameterLayout(transformer_specs(model)), class_bounds)
    return assign(*blocks, topology, config.optimizer.placement)


def owned_elements(ownership: Ownership) -> dict[int, int]:
    """{world rank: elements of the vector that it owns} of every possible owner."""
    owned = dict.fromkeys(ownership.ranks, 0)
    for start, stop, owner in ownership.spans:
        owned[ownership.ranks[owner]] += stop - start
    return owned
