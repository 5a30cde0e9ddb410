"""``hiermpi plan``: the tree of ranks and what it costs, before a job is submitted."""

import argparse
import json
import os
from pathlib import Path

from hiermpi.commands import Command
from hiermpi.config.loading import add_config_arguments

SUMMARY = "show the tree of ranks, who computes and what memory it takes, without MPI"
EXAMPLE = """\
example:
    hiermpi plan --ranks 64
    hiermpi plan --ranks 1000 --ranks-per-node 48 --config run.toml --data data.h5
    hiermpi plan --ranks 48 --suggest --cores-per-node 48"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--ranks-per-node", type=int, default=0, metavar="M", help="ranks on each node (default: all on one)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="dataset, for its vocabulary and size")
    parser.add_argument("--suggest", action="store_true", help="suggest a batch size and threads per rank")
    parser.add_argument(
        "--cores-per-node",
        type=int,
        default=0,
        metavar="C",
        help="of the nodes, to tell who sums and to suggest (default: this machine's)",
    )
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="measures to predict from (default: those of hiermpi bench reduce)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from hiermpi.config.loading import load_config
    from hiermpi.errors import UsageError
    from hiermpi.hierarchy.topology import Topology
    from hiermpi.planning.cost import forecast
    from hiermpi.planning.drawing import describe
    from hiermpi.planning.machine import read_machine
    from hiermpi.planning.plan import plan, suggest

    config = load_config(arguments, os.environ)
    if arguments.ranks < 1 or arguments.ranks_per_node < 0 or arguments.cores_per_node < 0:
        raise UsageError(
            f"--ranks {arguments.ranks} --ranks-per-node {arguments.ranks_per_node} --cores-per-node "
            f"{arguments.cores_per_node}: expected at least 1 rank, and 0 (all on one node; this machine's cores) "
            "or more"
        )
    vocab_size, data_bytes = facts_of(arguments.data) if arguments.data else (256, 0)
    topology = Topology(
        arguments.ranks,
        config.model.symmetry_order,
        arguments.ranks_per_node,
        coordinators=config.hierarchy.coordinators,
    )
    cores = arguments.cores_per_node or os.cpu_count() or 1
    planned = plan(topology, config, config.model.vocab_size or vocab_size, data_bytes, cores)
    machine = read_machine(arguments.machine)
    if machine:
        planned["prediction"] = forecast(machine, topology, config, planned["vocab_size"])
    suggestions = suggest(topology, config, planned, cores) if arguments.suggest else []
    if arguments.json:
        print(json.dumps(planned | {"suggestions": [entry._asdict() for entry in suggestions]}))
    else:
        print(describe(planned, suggestions))
    return 0


def facts_of(data: Path) -> tuple[int, int]:
    """Vocabulary size of a dataset, and bytes of its tokens that a run keeps in memory."""
    from hiermpi.storage.dataset import open_dataset

    dataset = open_dataset(data)
    kept = dataset.kept_bytes
    dataset.close()
    return dataset.vocab_size, kept


PLAN = Command(SUMMARY, EXAMPLE, configure, run)
