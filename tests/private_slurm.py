"""A private SLURM on this machine: a controller and four emulated nodes in a temporary folder.

Each node is a slurmd with a host name of its own (a UTS namespace), as MPI and PMIx tell nodes apart by their names.
Needs root, and Debian's slurm-wlm with libpmix installed before a slurmd starts.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = 4
CPUS = 4

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmdTimeout=60
KillWait=2
MailProg=/bin/true
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for entry in sockets:
        entry.bind(("127.0.0.1", 0))
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


def wait_until(condition, seconds, what):
    """Poll until ``condition`` gives something true; that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


class Cluster:
    """The daemons and the questions to them.

    Args:
        folder: empty; everything of the cluster lies in it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.names = [f"node{i}" for i in range(NODES)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "TMPDIR": str(folder / "tmp")}

    def start(self):
        """Start the daemons and wait for the nodes."""
        ports = free_ports(NODES + 1)
        nodes = [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=1000 State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], port=ports[0], folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        (self.folder / "tmp").mkdir()
        self.ask("slurmctld")
        for name in self.names:
            (self.folder / f"tmp-{name}").mkdir()
            self.boot(name)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(NODES)], 20, "nodes are up")

    def boot(self, name):
        """Start the daemon of a node."""
        self.ask("unshare", "--uts", "sh", "-c", f"hostname {name} && exec slurmd -N {name}")
        wait_until(lambda: self.pid_file(name).exists() and self.pid_file(name).read_text(), 10, f"{name} is up")

    def pid_file(self, name):
        """Where the daemon of a node writes its pid."""
        return self.folder / f"slurmd-{name}.pid"

    def lose(self, name):
        """Kill every process of a node at once, as if its power were cut."""
        pid = int(self.pid_file(name).read_text())
        namespace = os.readlink(f"/proc/{pid}/ns/uts")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone in the meantime
                if os.readlink(process / "ns" / "uts") == namespace:
                    os.kill(int(process.name), signal.SIGKILL)
        for left in (self.pid_file(name), *(self.folder / f"spool-{name}").glob("*.*")):
            left.unlink()

    def stop(self):
        """End every job and every daemon."""
        try:
            self.ask("scancel", "--user=root", check=False)
            wait_until(lambda: not self.ask("squeue", "-h", check=False), 15, "all jobs have ended")
        finally:
            stop_daemons(self.folder.glob("*.pid"))

    def ask(self, *words, check=True):
        """What a command of SLURM prints."""
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert not check or result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, script, *options, environment, arguments=()):
        """Submit a job script; the job's number."""
        words = ["sbatch", "--parsable", *options, str(script), *map(str, arguments)]
        result = subprocess.run(
            words, env={**self.environment, **environment}, capture_output=True, text=True, timeout=30, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number):
        """The fields of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "--oneliner", "job", number)))

    def wait_for(self, number, state, seconds=60):
        """Wait until a job is in a state."""
        wait_until(lambda: self.job(number)["JobState"] == state, seconds, f"job {number} is {state}")

    def finish(self, number, seconds=60):
        """Wait for the end of a job; its fields. One that was requeued starts at once: SLURM would wait two minutes."""

        def ended():
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Restarts"] != "0" and not steps_of(job["JobId"]):
                time.sleep(2)  # a start within a second of the last one's end is refused: "Job credential revoked"
                self.ask("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now", check=False)
            return job if job["JobState"] in ENDED else None

        return wait_until(ended, seconds, f"job {number} has ended")


def steps_of(number):
    """Command lines of the processes that watch over steps of a job; an earlier start's may still be there."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes())
    return [words for words in found if words.startswith(f"slurmstepd: [{number}.".encode())]


def stop_daemons(pid_files, seconds=10):
    """End the daemons that wrote these pid files, and wait until they are gone."""
    pids = [int(text) for text in (file.read_text() for file in pid_files) if text]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while pids and time.monotonic() < deadline:
            time.sleep(0.05)
            pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
