"""The package holds the commands of the command line, with their ``--help`` texts and the functions that they run.

Each command is a :class:`Command` in a module here and one line in :data:`hiermpi.config.registry.COMMANDS`. Imports
at the top of these modules stay light: ``--help`` imports all of them, on login nodes that forbid MPI_Init.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Command:
    """A command, which has at least one of ``run`` and ``run_together``.

    A command with both runs on all ranks where a launcher started several, and alone elsewhere. Both return the exit
    code.
    """

    summary: str
    """The line of the command in ``hiermpi --help``."""
    example: str
    """The text that ``hiermpi COMMAND --help`` shows below the summary."""
    configure: Callable[[argparse.ArgumentParser], None]
    """The function that adds the command's flags to its parser."""
    run: Callable[[argparse.Namespace], int] | None = None
    """The function that runs the command in this process, without MPI; None where it needs all ranks."""
    run_together: "Callable[[argparse.Namespace, MPI.Comm], int] | None" = None
    """The function that runs the command on all ranks, as a collective call; None where one process does it."""


def add_family_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lets a checkpoint's model be made by code of the user's own."""
    parser.add_argument(
        "--model.family",
        dest="model.family",
        default="",
        metavar="NAME",
        help="the model's family, where the checkpoint is of one from outside: package.module:object",
    )


def given_family(arguments: argparse.Namespace) -> str | None:
    """Return the family that the user gave with the flag or in the environment, or None where there is none."""
    return getattr(arguments, "model.family") or os.environ.get("HIERMPI_MODEL__FAMILY") or None
