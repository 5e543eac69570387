"""A real Slurm of two nodes on this machine, for the tests: munged, slurmctld and two slurmd of its own."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

# cred_expire is how long a requeued job waits: 120 s unless set, 5 s at least. The scheduler looks every second; a node
# that does not answer is down after 10 s.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """The programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """Running until ``stop``; ``environment`` is what its commands need."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path is at most 107 bytes
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        names = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(ports=free_ports(3), **names))
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SBATCH_", "SLURM_JOB"))]:
            del self.environment[name]
        self.daemons: dict[str, subprocess.Popen] = {}
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self.until("munged answers", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until(
            "both nodes are idle",
            lambda: self.told("sinfo", "-p", "test", "-hN", "-o", "%T") == "idle\nidle",
            seconds=60,
        )

    def _start(self, *command: str, name: str = "") -> None:
        log = (self.folder / f"{name or command[0]}.out").open("a")
        self.daemons[name or command[0]] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def told(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
        return done.stdout.strip()

    def submit(self, *arguments: object, **environment: str) -> tuple[str, Path]:
        """sbatch with these arguments, from the project's folder; the job's id and where its output goes."""
        command = ["sbatch", "--parsable", f"--output={self.folder}/%A-%a.out", *map(str, arguments)]
        port = {"MASTER_PORT": str(free_ports(1)[0])}  # another cluster on this machine has jobs of the same numbers
        everything = {**self.environment, "OMP_NUM_THREADS": "1", **port, **environment}
        done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), self.folder / f"{done.stdout.strip()}-4294967294.out"

    def job(self, job: str, field: str) -> str:
        """A field of `scontrol show job`: JobState, Restarts, ..."""
        shown = dict(
            item.split("=", 1) for item in self.told("scontrol", "-o", "show", "job", job).split() if "=" in item
        )
        return shown.get(field, "")

    def wait(self, job: str, *states: str, seconds: float = 240) -> None:
        self.until(f"job {job} is {'/'.join(states)}", lambda: self.job(job, "JobState") in states, seconds)

    def processes_on(self, node: str) -> list[psutil.Process]:
        """All that jobs run on a node, with the daemons' helpers (slurmstepd)."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            mine = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if mine and environment.get("SLURMD_NODENAME") == node:
                found.append(process)
        return found

    def kill_node(self, node: str, with_daemon: bool) -> None:
        """SIGKILL to everything on a node, unwarned; with its slurmd it is as if the power went."""
        doomed = self.processes_on(node)
        if with_daemon:
            daemon = psutil.Process(self.daemons[node].pid)
            doomed += [*daemon.children(recursive=True), daemon]
        for action in (psutil.Process.suspend, psutil.Process.kill):
            for process in doomed:
                try:
                    action(process)
                except psutil.NoSuchProcess:
                    continue
        if with_daemon:
            self.daemons[node].wait(timeout=30)

    def until(self, what: str, done, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert time.monotonic() < deadline, f"not so within {seconds} s: {what}\n{self.diagnosis(dead)}"
            time.sleep(0.2)

    def diagnosis(self, dead: list[str]) -> str:
        logs = "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2500:]}" for p in self.folder.glob("*.[ol]*"))
        return f"ended: {dead}\n{self.told('squeue')}\n{logs}"

    def stop(self) -> None:
        """End the jobs, then the daemons this object started, and no others."""
        for job in self.told("squeue", "-h", "-o", "%A").split():
            self.told("scancel", job)
        self.until("no job is left", lambda: not self.told("squeue", "-h"), seconds=90)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
