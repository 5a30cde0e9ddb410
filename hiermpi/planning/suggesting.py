"""A batch size and a number of threads that suit the ranks."""

from typing import Any, NamedTuple

from hiermpi.config.schema import Config
from hiermpi.hierarchy.topology import Topology

FEWEST_TOKENS = 512
"""Per leaf and step: below, the products are too small and the exchange weighs too much."""
MOST_TOKENS = 2048
"""Per leaf and step that are suggested: above, there is little left to gain."""


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
        planned: see :func:`hiermpi.planning.plan.plan`.
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
