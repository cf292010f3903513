"""A Slurm of its own on this machine: munge, a controller and two nodes, in a temporary folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.processes import free_ports
from helpers.running import ENVIRONMENT

ROOT = Path(__file__).parents[2]
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Also how long Slurm waits before it starts a requeued job.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes claim the cores and the memory that the batch files ask for, whatever this machine has.
SlurmdParameters=config_overrides
MpiDefault=none
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ReturnToService=2
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=left NodeHostname={host} NodeAddr=127.0.0.1 Port={left} CPUs=4 RealMemory=65536
NodeName=right NodeHostname={host} NodeAddr=127.0.0.1 Port={right} CPUs=4 RealMemory=65536
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here, if so."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)" if absent else None


@dataclass
class Cluster:
    """Two nodes that each have room for one job at a time; partition ``high`` preempts ``low``, the default."""

    folder: Path
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{SEARCHED}"
        return {**ENVIRONMENT, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), "DALLE_ROOT": str(ROOT)}

    def start(self) -> None:
        """Raises RuntimeError, with what the daemons said, if the nodes are not idle in five minutes."""
        munge = self.folder / "munge"
        for name in ("munge", "state", "spool", "jobs"):
            (self.folder / name).mkdir(mode=0o700)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o400)
        controller, left, right = free_ports(3)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), user=getpass.getuser(), folder=self.folder,
                controller=controller, left=left, right=right,
            )
        )  # fmt: skip
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run_daemon("munged", "--foreground", "--force", *(f"--{k}={munge / v}" for k, v in places.items()))
        self._wait_until(lambda: (munge / "socket").exists(), "munged did not start")
        self._run_daemon("slurmctld", "-D", "-c")
        for node in ("left", "right"):
            self._run_daemon("slurmd", "-D", "-c", "-N", node)
        self._wait_until(
            lambda: self.ask("sinfo", "--noheader", "--partition=low", "--format=%t %D").split() == ["idle", "2"],
            "the nodes did not come up",
        )

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.ask("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        self.ask("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 60
        while self.ask("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """Stdout of a client of Slurm's, empty where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        return done.stdout.strip()

    def submit(self, *words: object, **variables: object) -> str:
        """The number of a new job: options of sbatch, a batch file's name and its arguments."""
        told = [str(ROOT / "scripts" / "slurm" / str(w)) if str(w).endswith(".sh") else str(w) for w in words]
        done = subprocess.run(
            ["sbatch", "--parsable", *told],
            env={**self.environment, **{name: str(value) for name, value in variables.items()}},
            cwd=self.folder / "jobs",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> list[dict[str, str]]:
        """Return the record that Slurm keeps of a job, or of each job of an array."""
        lines = self.ask("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def finish(self, *jobs: str, seconds: float = 1800) -> list[dict[str, str]]:
        """Wait until all ``jobs`` have ended and return their records."""
        deadline = time.monotonic() + seconds
        while True:
            facts = [each for job in jobs for each in self.facts(job)]
            if facts and all(each["JobState"] in DONE for each in facts):
                return facts
            assert time.monotonic() < deadline, (self.ask("squeue"), self.said())
            time.sleep(0.5)

    def said(self) -> str:
        """All that jobs have printed."""
        return "\n".join(file.read_text() for file in sorted((self.folder / "jobs").glob("*.out")))

    def _run_daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as said:
            program = str(shutil.which(command[0], path=SEARCHED))
            self._daemons.append(
                subprocess.Popen([program, *command[1:]], env=self.environment, stdout=said, stderr=said)
            )

    def _wait_until(self, ready: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + 300
        while not ready():
            if time.monotonic() > deadline:
                self.stop()
                told = [file.read_text()[-2000:] for file in self.folder.glob("*.out")]
                raise RuntimeError(f"{otherwise}: {told}")
            time.sleep(0.2)
