"""``hiermpi prepare``: text files into one dataset."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.commands import Command

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "turn text files, folders or Python's own source into one dataset"
EXAMPLE = """\
example:
    hiermpi prepare my-texts/ more.txt --out data.h5
    hiermpi prepare stdlib --out data.h5        (Python's standard library: no download)
    hiermpi prepare shakespeare.txt --out data.h5 --tokenizer chars
    mpirun -n 8 hiermpi prepare corpus/ --out data.h5 --tokenizer bpe --vocab-size 8192"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="text file, folder (recursively), or stdlib")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="dataset to make")
    parser.add_argument("--tokenizer", choices=("bytes", "chars", "bpe"), default="bytes", help="(default: bytes)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the bpe vocabulary (default: 8192)")
    parser.add_argument(
        "--tokenizer-of", type=Path, metavar="FILE", help="use the tokenizer of this dataset or checkpoint"
    )
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
    from hiermpi.preparation.encoding import Encoder
    from hiermpi.preparation.preparing import prepare

    print(prepare(arguments, Encoder()))
    return 0


def run_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Prepare on rank 0, which has all ranks encode. Collective over ``world``."""
    from hiermpi.communication.agreement import agree
    from hiermpi.communication.waiting import Waiter
    from hiermpi.preparation.encoding import TeamEncoder
    from hiermpi.preparation.preparing import prepare

    encoder, error = TeamEncoder(world), None
    if world.rank != 0:
        encoder.serve()
    else:
        try:
            print(prepare(arguments, encoder))
        except Exception as caught:  # noqa: BLE001  (raised on all ranks by agree)
            error = caught
        encoder.close()
    agree(world, error, Waiter())
    return 0


PREPARE = Command(SUMMARY, EXAMPLE, configure, run, run_together)
