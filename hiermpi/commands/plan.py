"""``hiermpi plan``: the tree of ranks and what it costs, before a job is submitted."""

import argparse
import json
import os
from pathlib import Path

from hiermpi.config.loading import add_config_arguments

SUMMARY = "show the tree of ranks, who computes and what memory it takes, without MPI"
EXAMPLE = """\
example:
    hiermpi plan --ranks 64
    hiermpi plan --ranks 1000 --ranks-per-node 48 --config run.toml --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--ranks-per-node", type=int, default=0, metavar="M", help="ranks on each node (default: all on one)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="dataset, for the size of its vocabulary")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from hiermpi.config.loading import load_config
    from hiermpi.errors import UsageError
    from hiermpi.hierarchy.topology import Topology
    from hiermpi.planning import describe, plan

    config = load_config(arguments, os.environ)
    if arguments.ranks < 1 or arguments.ranks_per_node < 0:
        raise UsageError(
            f"--ranks {arguments.ranks} --ranks-per-node {arguments.ranks_per_node}: "
            "expected at least 1 rank, and 0 (all on one node) or more on each node"
        )
    vocab_size = config.model.vocab_size
    if not vocab_size:
        vocab_size = vocabulary_of(arguments.data) if arguments.data else 256
    topology = Topology(
        arguments.ranks,
        config.model.symmetry_order,
        arguments.ranks_per_node,
        coordinators=config.hierarchy.coordinators,
    )
    planned = plan(topology, config, vocab_size)
    print(json.dumps(planned) if arguments.json else describe(planned))
    return 0


def vocabulary_of(data: Path) -> int:
    """Vocabulary size of a dataset."""
    from hiermpi.storage.dataset import open_dataset

    return open_dataset(data).vocab_size
