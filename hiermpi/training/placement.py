"""Who owns which part of a model's vector, and the optimizer of each owner."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hiermpi.config.schema import Config
from hiermpi.hierarchy.ownership import Ownership, assign
from hiermpi.hierarchy.topology import Topology
from hiermpi.kernels import Kernels
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.symmetry import SymmetryTable
from hiermpi.model.transformer import Transformer, transformer_specs
from hiermpi.optimizer.adamw import Moments
from hiermpi.optimizer.norm import norm_blocks
from hiermpi.optimizer.update import Optimizer, OptimizerSettings


def ownership_of(config: Config, topology: Topology, groups: NDArray[np.uint8]) -> Ownership:
    """The owners under ``optimizer.placement``; ``groups`` (V,) are the symmetry classes of the tokens."""
    layout = ParameterLayout(transformer_specs(config.model))
    class_bounds = SymmetryTable(groups, config.model.symmetry_order).class_bounds
    return assign(*norm_blocks(layout, class_bounds), topology, config.optimizer.placement)


def optimizer_settings(config: Config) -> OptimizerSettings:
    """What updates need to know of ``config``."""
    return OptimizerSettings(config.optimizer, config.train.grad_clip, config.train.steps)


def make_optimizer(
    config: Config,
    model: Transformer,
    state: Sequence[Mapping[str, NDArray[np.float32]]],
    ownership: Ownership,
    rank: int,
    kernels: Kernels | None = None,
) -> Optimizer | None:
    """The optimizer of what ``rank`` owns; the root has one in any case, other ranks may have none.

    ``state`` are zeroed slots, see :class:`Optimizer`.
    """
    number = ownership.number(rank)
    if number is None:
        return None
    return Optimizer(
        model.parameters,
        optimizer_settings(config),
        [Moments(**slot) for slot in state],
        ownership,
        number,
        model.symmetry.class_bounds,
        kernels,
        config.lattice.coupling,
    )
