"""The command line finds the command, decides whether it needs MPI, runs it, and exits with its code.

A heavy module is imported only where it is needed: ``--help`` must answer on a login node, where MPI_Init may be
forbidden, and every rank pays for every import.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from hiermpi import signals
from hiermpi.config.registry import COMMANDS
from hiermpi.errors import EXIT_ERROR, UsageError, UserError

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

DESCRIPTION = """\
Train language models data-parallel on the CPU cores of a cluster, through MPI.

    hiermpi prepare stdlib --out data.h5
    mpirun -n 13 hiermpi train --data data.h5 --run runs/first
    hiermpi evaluate runs/first --data data.h5
    hiermpi generate runs/first --prompt "def main("

Exit codes: 0 done; 1 error; 2 command line or configuration; 75 stopped early with a checkpoint, run me again.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, so that under MPI every rank can receive the error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class ShowVersion(argparse.Action):
    """Prints the version and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"hiermpi {version('hiermpi')}")
        parser.exit()


def build_parser() -> Parser:
    """Make the parser of all commands."""
    parser = Parser(
        prog="hiermpi",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        child = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}\n\n{command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(child)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UsageError; ``--help`` and ``--version`` print and raise SystemExit."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        raise UsageError(f"name a command: {', '.join(COMMANDS)} (see hiermpi --help)")
    if unknown:
        from hiermpi.config.loading import unknown_flag_message

        flags = [word for word in unknown if word.startswith("-")]
        message = unknown_flag_message(flags[0]) if flags else f"unexpected argument {unknown[0]}"
        raise UsageError(f"{message} (see hiermpi {arguments.command} --help)")
    return arguments


def launched_ranks() -> int:
    """Return the number of ranks that a launcher started, or 1 where there is no launcher."""
    return max([int(os.environ[name]) for name in SIZE_VARIABLES if os.environ.get(name, "").isdigit()], default=1)


def launched_rank() -> int:
    """Return this process's rank as the launcher gives it, or 0 where there is no launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)


def runs_together(argv: Sequence[str]) -> bool:
    """Return whether the command line asks for a command that ranks run together."""
    if not argv or {"-h", "--help", "--version"} & set(argv) or argv[0] not in tuple(COMMANDS):
        return False
    command = COMMANDS[argv[0]]
    return command.run_together is not None and (command.run is None or launched_ranks() > 1)


def set_up_logging(rank: int) -> None:
    """Log to stderr: everything on rank 0; on other ranks only warnings, with the rank in front."""
    logger = logging.getLogger("hiermpi")
    handler = StderrHandler()
    handler.setFormatter(LevelFormatter(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the current ``sys.stderr``, which a live progress bar replaces."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class LevelFormatter(logging.Formatter):
    """A formatter of plain lines; errors and warnings get their level, and ranks other than 0 their number."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        prefix = f"rank {self.rank}: " if self.rank and record.levelno < logging.CRITICAL else ""
        if record.levelno >= logging.ERROR:
            return f"hiermpi: {prefix}{text}"
        return f"hiermpi: warning: {prefix}{text}" if record.levelno >= logging.WARNING else prefix + text


def run_alone(argv: Sequence[str]) -> int:
    """Run a command in this process only, and return its exit code."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an exit removes temporary files
    if launched_rank() > 0:  # a launcher started several ranks for a command that needs one process
        return 0
    try:
        arguments = parse(argv)
        run = COMMANDS[arguments.command].run
        assert run is not None
        return run(arguments)
    except UserError as error:
        logging.getLogger("hiermpi").error("%s", error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def run_together(argv: Sequence[str]) -> NoReturn:
    """Run a command on all ranks, and end the process with its exit code."""
    from mpi4py import MPI

    from hiermpi.communication.agreement import from_root, run_collectively
    from hiermpi.communication.waiting import Waiter

    set_up_logging(MPI.COMM_WORLD.rank)

    def body(world: MPI.Comm) -> int:
        arguments = from_root(world, lambda: parse(argv), Waiter())
        return COMMANDS[arguments.command].run_together(arguments, world)

    run_collectively(body)
    raise AssertionError("unreachable")


def main(argv: Sequence[str]) -> int:
    """Run ``hiermpi`` with these arguments and return the exit code; a command on all ranks ends the process itself."""
    # This precedes the import of numpy: ranks are the parallelism, and a BLAS with threads oversubscribes the cores.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    set_up_logging(launched_rank())
    if runs_together(argv):
        if argv[0] == "train":
            signals.listen()
        run_together(argv)
    return run_alone(argv)


def console() -> NoReturn:
    """Run the ``hiermpi`` command as its entry point."""
    sys.exit(main(sys.argv[1:]))


