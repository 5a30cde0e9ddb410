"""``hiermpi bench``: side-by-side measurements on this machine."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiermpi.commands import Command
from hiermpi.config.loading import add_config_arguments

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.config.schema import Config

SUMMARY = "measure kernels, the training step or the reductions, side by side in one run"
EXAMPLE = """\
example:
    hiermpi bench kernels
    mpirun -n 13 hiermpi bench reduce
    mpirun -n 2 hiermpi bench step --model.context_length 64 --train.batch_size 12

Methods take turns; medians and quartiles are shown, and ratios. `step` also runs PyTorch where it is installed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("what", choices=("reduce", "step", "kernels"))
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="turns of each method (default: 12)")
    parser.add_argument(
        "--largest", type=int, default=10**8, metavar="N", help="most floats that reduce sums (default: 100000000)"
    )
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="where reduce keeps what plan reads (default: in ~/.config)"
    )
    parser.add_argument(
        "--peer", choices=("torch", "none"), default="torch", help="what step is compared with (default: torch)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser)


def run_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Measure on all ranks; rank 0 prints. Collective over ``world``."""
    from hiermpi.benchmarks.kernels import bench_kernels
    from hiermpi.benchmarks.measuring import table
    from hiermpi.benchmarks.step import bench_step

    if arguments.what == "kernels":
        result: dict[str, Any] = bench_kernels(arguments.rounds) if world.rank == 0 else {}
    elif arguments.what == "reduce":
        result = bench_reduce_and_machine(arguments, world)
    else:
        result = bench_step(resolved_config(arguments, world), world, arguments.rounds, peers=arguments.peer == "torch")
    if world.rank == 0:
        notes = [*result.get("notes", [])]
        text = table(result["rows"], result["ratios"], "gflops" if arguments.what == "step" else "")
        print(json.dumps(result) if arguments.json else "\n".join([text, *notes]))
    return 0


def bench_reduce_and_machine(arguments: argparse.Namespace, world: "MPI.Comm") -> dict[str, Any]:
    """Measure the reductions; on one node, also what plan predicts from, and keep that. Collective over ``world``."""
    from hiermpi.benchmarks.machine import measure_machine
    from hiermpi.benchmarks.reduce import bench_reduce
    from hiermpi.communication.agreement import agreed
    from hiermpi.communication.waiting import Waiter
    from hiermpi.planning.machine import default_path, keep_machine

    config = resolved_config(arguments, world)
    result = bench_reduce(world, config.hierarchy.reduction, arguments.largest, arguments.rounds)
    if result.pop("nodes") > 1:
        result["notes"].append("several nodes: what plan predicts from is measured on one")
        return result
    machine = measure_machine(config, world, result["rows"])
    with agreed(world, Waiter()):
        if world.rank == 0:
            path = arguments.machine or default_path()
            keep_machine(path, machine)
            result["machine"] = json.loads(machine.to_json())
            result["notes"].append(f"kept in {path}: hiermpi plan predicts from it")
    return result


def resolved_config(arguments: argparse.Namespace, world: "MPI.Comm") -> "Config":
    """Read the configuration on rank 0, for every rank. Collective over ``world``."""
    from hiermpi.communication.agreement import from_root
    from hiermpi.communication.waiting import Waiter

    def read() -> "Config":
        from hiermpi.config.loading import load_config

        config = load_config(arguments, os.environ)
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 256)
        return dataclasses.replace(config, model=model)

    return from_root(world, read, Waiter())


BENCH = Command(SUMMARY, EXAMPLE, configure, run_together=run_together)
