"""The MPI tests of the sums on several nodes with unequal numbers of ranks, emulated by host names (needs root)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch import BIN, environment, finish

TESTS = Path(__file__).parents[1]
EMULATED = subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not EMULATED, reason="host names cannot be changed here")
@pytest.mark.timeout(240)
def test_nodes_of_unequal_size_train_the_same_model(tmp_path):
    counts = (2, 1, 2)
    names = [socket.gethostname(), "hiermpi-node1", "hiermpi-node2"]
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{name} slots={count}\n" for name, count in zip(names, counts, strict=True)))
    launcher = ["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(TESTS / "emulated_ssh.sh")]
    several = ["--hostfile", str(hosts), "--bind-to", "none", "-n", str(sum(counts))]
    selected = "number_of_nodes or test_sum or test_broadcast or test_state_is_kept or test_any_number or done_again"
    # ssh would start a login shell: the launcher looks for its daemon on PATH.
    env = environment({"PATH": f"{BIN}:{os.environ['PATH']}", "HIERMPI_TEST_NODES": str(len(counts))})
    del env["PRTE_MCA_rmaps_default_mapping_policy"]  # slots are what the hosts say
    python = [sys.executable, "-m", "mpi4py", "-m", "pytest", "-q", "-x", "--with-mpi"]
    files = [str(TESTS / "mpi" / f"test_{name}.py") for name in ("communicators", "reduction", "equality", "slots")]
    process = subprocess.Popen(
        [str(BIN / "mpiexec"), *launcher, *several, *python, *files, "-k", selected],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    done = finish(process, 200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
