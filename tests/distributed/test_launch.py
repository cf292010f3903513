"""Ranks read from the environment of launchers, and ranks that the command itself starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle_cli.commands.options import _without_gpus, starts_processes
from dalle_cli.distributed.launch import Launch, read_launch
from dalle_cli.distributed.spawn import has_launcher
from dalle_cli.errors import UserError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "41", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}  # fmt: skip


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED, SRUN], ids=["torchrun", "deepspeed", "srun"])
def test_three_launchers_give_the_same_rank(environment: dict[str, str]) -> None:
    launch = read_launch(environment)
    assert launch == Launch(rank=5, size=8, local_rank=1, local_size=4, node=1)
    assert not launch.leads
    # torch reads the same from the variables for the rendezvous.
    assert read_launch(launch.rendezvous) == launch or environment is not SRUN


def test_srun_meets_on_the_first_machine() -> None:
    assert read_launch(SRUN).rendezvous["MASTER_ADDR"] == "gpu07"
    for hosts, first in [("a1", "a1"), ("a1,b2", "a1"), ("x[3,5-9]-ib,y", "x3-ib"), ("n[007-009]", "n007")]:
        assert read_launch({**SRUN, "SLURM_JOB_NODELIST": hosts}).rendezvous["MASTER_ADDR"] == first
    without = {key: value for key, value in SRUN.items() if key != "SLURM_JOB_NODELIST"}
    assert read_launch(without).rendezvous["MASTER_ADDR"] == "10.0.0.9"
    ports = {read_launch({**SRUN, "SLURM_JOB_ID": str(job)}).rendezvous["MASTER_PORT"] for job in range(50)}
    assert len(ports) == 50
    assert all(1024 < int(port) < 32768 for port in ports)
    assert read_launch({**SRUN, "MASTER_PORT": "1234"}).rendezvous["MASTER_PORT"] == "1234"


def test_a_batch_script_and_a_single_task_are_alone() -> None:
    script = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert read_launch(script) == read_launch({**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFB)}) == Launch()
    one = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert read_launch(one) == Launch()
    # Inside a task of srun, torchrun's variables take precedence.
    assert read_launch({**SRUN, **TORCHRUN, "RANK": "6", "LOCAL_RANK": "2"}).rank == 6


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1, LOCAL_WORLD_SIZE 1 on node 1 contradict"),
        (TORCHRUN, {"GROUP_RANK": "0"}, "on node 0 contradict"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE 5"),
        (DEEPSPEED, {"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
        (SRUN, {"SLURM_LOCALID": ""}, "SLURM_LOCALID not set, but SLURM_PROCID is"),
        (SRUN, {"SLURM_PROCID": "8"}, "SLURM_PROCID 8, SLURM_NTASKS 8"),
        (SRUN, {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many', not a number"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "SLURM_STEP_TASKS_PER_NODE is '4x2'"),
        (SRUN, {"SLURM_NODEID": "0"}, "on node 0 contradict"),
        (SRUN, {"SLURM_JOB_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": ""}, "set MASTER_ADDR"),
    ],
)
def test_contradictory_variables_are_refused(environment: dict[str, str], changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_launch({**environment, **changes})
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_of_a_rank_has_no_gpus_option() -> None:
    words = ["train-prior", "r.yaml", "--gpus", "2", "--set", "a=b", "--gpus=3"]
    assert _without_gpus(words) == ["train-prior", "r.yaml", "--set", "a=b"]


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED, SRUN], ids=["torchrun", "deepspeed", "srun"])
def test_gpus_under_a_launcher_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--gpus starts processes, but a launcher started this one; drop one"):
        starts_processes(2)


def test_sruns_only_task_may_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    assert not has_launcher()


# Ranks that the command starts itself, by ``start_processes`` with a stand-in for dalle that imports nothing

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from dalle_cli.distributed import spawn
spawn.GRACE_SECONDS = 1.0
try:
    spawn.start_processes(3, sys.argv[2:])
except Exception as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
STAND_IN = """
import os, pathlib, signal, sys, time
rank, folder, what = os.environ["RANK"], pathlib.Path(sys.argv[1]), sys.argv[2]
def leave(*_):
    (folder / f"signalled-{rank}").touch()
    sys.exit(75)
if what == "leave":
    signal.signal(signal.SIGUSR1, leave)
(folder / rank).write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['MASTER_PORT']}")
if what == "fail" and rank == "1":
    sys.exit(4)
if what != "end":
    time.sleep(60)
"""


@pytest.fixture
def started(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function that starts three ranks with a task and returns the launcher and their ids once all run."""
    package = tmp_path / "stand-in" / "dalle_cli"
    package.mkdir(parents=True)
    real = Path(__file__).resolve().parents[2] / "dalle_cli"
    for name in ("__init__.py", "errors.py", "progress.py", "distributed"):
        (package / name).symlink_to(real / name)
    (package / "__main__.py").write_text(STAND_IN)
    launchers: list[subprocess.Popen[str]] = []

    def start(what: str) -> tuple[subprocess.Popen[str], list[int]]:
        launcher = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(package.parent), str(tmp_path), what],
            cwd=package.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        launchers.append(launcher)
        deadline = time.monotonic() + 60
        files = [tmp_path / str(rank) for rank in range(3)]
        while not all(file.is_file() and file.read_text().count(" ") == 2 for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len({file.read_text().partition(" ")[2] for file in files}) == 1
        return launcher, [int(file.read_text().split()[0]) for file in files]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def gone(processes: list[int]) -> bool:
    """Return whether all have ended within 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = []
        for process in processes:
            try:
                state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                continue
            if state != "Z":
                alive.append(process)
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_all_ranks_succeed(started) -> None:  # type: ignore[no-untyped-def]
    launcher, processes = started("end")
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert error == ""
    assert gone(processes)


@pytest.mark.parametrize(("what", "how"), [("fail", "ended with exit code 4"), ("wait", "was ended by SIGKILL")])
def test_a_rank_that_fails_is_named_and_ends_the_others(started, what: str, how: str) -> None:  # type: ignore[no-untyped-def]
    launcher, processes = started(what)
    if what == "wait":
        os.kill(processes[1], signal.SIGKILL)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert gone(processes)
    first, last = error.splitlines()
    assert first == f"rank 1 of 3 {how}; waiting for the others"
    assert last.startswith(f"rank 1 of 3 {how}; ranks 0, 2 hung and were ended: ")


def test_signals_are_forwarded_and_exit_codes_passed_on(started, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    launcher, processes = started("leave")
    launcher.send_signal(signal.SIGUSR1)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert gone(processes)
    assert all((tmp_path / f"signalled-{rank}").exists() for rank in range(3))


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends orphans on Linux only")
def test_a_killed_launcher_leaves_no_rank_behind(started) -> None:  # type: ignore[no-untyped-def]
    launcher, processes = started("wait")
    launcher.kill()
    assert gone(processes)
