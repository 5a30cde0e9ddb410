"""``hiermpi prepare``: text files into one dataset."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "turn text files, folders or Python's own source into one dataset"
EXAMPLE = """\
example:
    hiermpi prepare my-texts/ more.txt --out data.h5
    hiermpi prepare stdlib --out data.h5        (Python's standard library: no download)
    hiermpi prepare shakespeare.txt --out data.h5 --tokenizer chars"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="text file, folder (recursively), or stdlib")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="dataset to make")
    parser.add_argument("--tokenizer", choices=("bytes", "chars", "bpe"), default="bytes", help="(default: bytes)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the bpe vocabulary")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="share of the text for validation (default: 0.1)"
    )
    parser.add_argument(
        "--symmetry",
        choices=("modulo", "frequency"),
        default="modulo",
        help="symmetry group of a token: its id modulo the order, or dealt so that groups weigh alike "
        "(default: modulo)",
    )
    parser.add_argument(
        "--symmetry-order", type=int, default=12, metavar="S", help="number of symmetry groups (default: 12)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")


def run(arguments: argparse.Namespace) -> int:
    """Prepare the dataset and tell what is in it."""
    from hiermpi.preparation import prepare

    print(prepare(arguments))
    return 0


def run_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Prepare on rank 0 while the others wait asleep. Collective over ``world``."""
    from hiermpi.communication.objects import agree
    from hiermpi.communication.waiting import Waiter

    error = None
    if world.rank == 0:
        try:
            run(arguments)
        except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
            error = caught
    agree(world, error, Waiter())
    return 0
