"""``hiermpi evaluate``: the mean loss of a checkpoint over a whole split."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.commands import Command, add_family_argument, given_family

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "mean loss, perplexity and bits per byte of a checkpoint over a whole split"
EXAMPLE = """\
example:
    hiermpi evaluate runs/first --data data.h5
    mpirun -n 8 hiermpi evaluate runs/first --data data.h5 --split train --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or file")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="dataset made by hiermpi prepare")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="(default: val)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_family_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate in this process."""
    from hiermpi.training.evaluation import evaluate

    report(evaluate(arguments.source, arguments.data, arguments.split, family=given_family(arguments)), arguments.json)
    return 0


def run_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Evaluate on all ranks. Collective over ``world``."""
    from hiermpi.training.evaluation import evaluate

    family = given_family(arguments)
    result = evaluate(arguments.source, arguments.data, arguments.split, family=family, comm=world)
    if world.rank == 0:
        report(result, arguments.json)
    return 0


def report(result: dict[str, str | float | int], as_json: bool) -> None:
    """Print the result for a program or for a person."""
    if as_json:
        print(json.dumps(result))
        return
    print(f"{'split':16}{result['split']}, {result['tokens']:,} tokens")
    print(f"{'loss':16}{result['loss']:.4f} nats per token")
    print(f"{'perplexity':16}{result['perplexity']:.3f}")
    print(f"{'bits per byte':16}{result['bits_per_byte']:.4f}")


EVALUATE = Command(SUMMARY, EXAMPLE, configure, run, run_together)
