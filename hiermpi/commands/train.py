"""``hiermpi train``: train a model on the hierarchy of ranks."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hiermpi.commands import Command
from hiermpi.config.loading import add_config_arguments
from hiermpi.errors import EXIT_DONE, EXIT_STOPPED

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.communication.shutdown import ErrorSink
    from hiermpi.training.session import TrainResult

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
    from hiermpi.communication.shutdown import set_error_sink
    from hiermpi.config.loading import load_config
    from hiermpi.training.session import run_training

    set_error_sink(write_error_to(arguments.run))
    result = run_training(
        world, lambda: load_config(arguments, os.environ), arguments.data, arguments.run, arguments.resume
    )
    if world.rank == 0:
        print("\n".join(result_lines(result, arguments.data)), flush=True)
    return EXIT_STOPPED if result.stopped else EXIT_DONE


def write_error_to(run: Path) -> "ErrorSink":
    """Return a sink for tracebacks that writes into the run folder."""

    def sink(rank: int, text: str) -> str:
        from hiermpi.storage.run_folder import RunFolder

        return str(RunFolder(run).write_error(rank, text))

    return sink


def result_lines(result: "TrainResult", data: Path) -> list[str]:
    """Tell a person how the run ended, and what to type next."""
    from hiermpi.reporting.tables import load_lines, machine_lines, phase_table

    if result.already_done:
        return [f"{result.run} is done at step {result.step}: a larger --train.steps continues it"]
    records = list(result.ranks)
    what = f"stopped by {result.reason}" if result.stopped else "done"
    lines = [f"{what} after step {result.step} of {result.steps}", f"{'loss':22}{result.loss:.4f} nats"]
    if result.validation_loss is not None:
        told = f"{result.validation_loss:.4f} nats per token, {result.bits_per_byte:.3f} bits per byte"
        lines.append(f"{'validation':22}{told}")
    if result.skipped:
        lines.append(f"{'skipped steps':22}{result.skipped}")
    lines += ["", *phase_table(records), *machine_lines(records), *load_lines(records[0])]
    following = "the same command again continues" if result.stopped else f"hiermpi evaluate {result.run} --data {data}"
    return [*lines, "", f"{'checkpoint':22}{result.checkpoint}", f"{'next':22}{following}"]


TRAIN = Command(SUMMARY, EXAMPLE, configure, run_together=run_together)
