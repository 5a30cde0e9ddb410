"""The commands of the command line: what each says in ``--help``, and what it runs.

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
    """A command: at least one of ``run`` and ``run_together``.

    A command with both runs on all ranks where a launcher started several, and alone elsewhere. Both return the exit
    code.
    """

    summary: str
    """One line of ``hiermpi --help``."""
    example: str
    """What ``hiermpi COMMAND --help`` shows below it."""
    configure: Callable[[argparse.ArgumentParser], None]
    """Adds the command's flags."""
    run: Callable[[argparse.Namespace], int] | None = None
    """Runs in this process, without MPI."""
    run_together: "Callable[[argparse.Namespace, MPI.Comm], int] | None" = None
    """Runs on all ranks; collective."""


def add_family_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag by which a user says that code of his own may be imported for a checkpoint."""
    parser.add_argument(
        "--model.family",
        dest="model.family",
        default="",
        metavar="NAME",
        help="the model's family, where the checkpoint is of one from outside: package.module:object",
    )


def given_family(arguments: argparse.Namespace) -> str | None:
    """Return the family that the user gave with the flag or in the environment; None where there is none."""
    return getattr(arguments, "model.family") or os.environ.get("HIERMPI_MODEL__FAMILY") or None
