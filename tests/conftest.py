"""How the suite behaves under mpiexec: one report, no hang, no misspelt marker."""

import os
import sys
import tempfile

import pytest

# Before numpy is imported: many ranks share few cores here.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

MPI_KEYWORDS = {"min_size"}


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_user():
    """Tests neither read nor write what ``bench reduce`` keeps in the user's configuration folder."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are not made for several ranks at once
        os.environ["XDG_CONFIG_HOME"] = folder
        yield


def _world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _under_mpi(config):
    return config.getoption("--with-mpi") or config.getoption("--only-mpi")


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: also run on 64 ranks")


def pytest_sessionstart(session):
    """One rank reports; pytest_runtest_logreport lets the others speak when they fail."""
    config = session.config
    if _under_mpi(config) and _world().rank != 0:
        reporter = config.pluginmanager.getplugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in item.iter_markers(name="mpi"):
            unknown = set(mark.kwargs) - MPI_KEYWORDS
            if unknown:  # pytest-mpi would ignore them without a word
                raise pytest.UsageError(f"{item.nodeid}: mpi marker has unknown keywords {sorted(unknown)}")
    if _under_mpi(config) and _world().size > 1:
        # The tests of one process would run once per rank, and those that launch mpiexec cannot run inside one.
        alone = [item for item in items if item.get_closest_marker("mpi") is None]
        if alone:
            config.hook.pytest_deselected(items=alone)
            items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Under MPI a failed test ends all ranks at once: the others may wait in a collective for ever."""
    if not report.failed or "mpi4py.MPI" not in sys.modules:
        return
    world = _world()
    if world.size > 1:
        sys.stderr.write(f"\nrank {world.rank} of {world.size}: {report.nodeid}\n{report.longreprtext}\n")
        sys.stderr.flush()
        world.Abort(1)
