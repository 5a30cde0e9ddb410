"""``hiermpi train``: train a model on the hierarchy of ranks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.config.loading import add_config_arguments

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMARY = "train a model on the ranks that mpirun or srun started; the same command again continues"
EXAMPLE = """\
example:
    mpirun -n 13 hiermpi train --data data.h5 --run runs/first --train.steps 500

The run folder holds config.toml, metrics.jsonl, ranks.jsonl, checkpoints/ and, when all steps are done, DONE.
To stop early with a checkpoint: touch RUN/STOP, or send SIGUSR1 to mpirun; the exit code is then 75.

Every setting below is also a key of the TOML file given with --config and an environment variable
HIERMPI_SECTION__FIELD; the command line beats the environment, which beats the file."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="dataset made by hiermpi prepare")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, new or to be continued")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto (default): go on from the newest whole checkpoint of the run; none: start again from step 0; "
        "PATH: from this checkpoint. What the run has beyond that is set aside, not deleted",
    )
    add_config_arguments(parser)


def run_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Train; collective over ``world``."""
    from hiermpi.training.session import train

    return train(arguments, world)
