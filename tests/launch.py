"""Start hiermpi as a user does, alone or under mpiexec, with a time limit that leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
QUIET_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def environment(extra=None):
    """The environment of a launched command."""
    return {**os.environ, **QUIET_MPI, **(extra or {})}


def command(*arguments, ranks=0, module=False):
    """The words of a command line: under mpiexec where ``ranks`` is not 0; ``module``: as mpi4py advises."""
    program = [sys.executable, "-m", "mpi4py", "-m", "hiermpi"] if module else [str(BIN / "hiermpi")]
    words = [*program, *map(str, arguments)]
    return [str(BIN / "mpiexec"), "-n", str(ranks), *words] if ranks else words


def start(*arguments, ranks=0, env=None, module=False, cwd=None):
    """Start a command in a process group of its own, in the folder ``cwd``."""
    return subprocess.Popen(
        command(*arguments, ranks=ranks, module=module),
        env=environment(env),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, timeout=60):
    """Wait for a started command; end it and all its ranks when the time is over."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end(process):
    """End a started command by force; return what it wrote."""
    process.terminate()  # mpiexec ends its ranks, which have process groups of their own
    try:
        return process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def run(*arguments, ranks=0, env=None, timeout=60, module=False, cwd=None):
    """Run a command to its end, in the folder ``cwd``."""
    return finish(start(*arguments, ranks=ranks, env=env, module=module, cwd=cwd), timeout)
