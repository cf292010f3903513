"""A signal stops training after the current update, with a checkpoint, and a resumed run ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from helpers.killed_runs import files, journal_lines
from helpers.processes import outputs_of, start
from helpers.running import DALLE, ENVIRONMENT, Chain, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

from dalle_cli.errors import RESUMABLE
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.training.signals import SECONDS_TO_STOP, StopRequest

UPDATES = 400


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[Any]]:
    """A function that gives the command to train a prior into a folder; no checkpoint is due before the end."""
    root = tmp_path_factory.mktemp("stopping")
    store = write_tokens(root / "tokens.zarr", 80, 48, 400, 4, 16)
    settings = smallest_recipe(root, None)
    training = {"updates": UPDATES, "save_every": 10_000, "validate_every": 30, "log_every": 7}
    settings["prior"]["training"] |= training
    settings["prior"]["learning_rate"] = {"peak": 1e-3, "schedule": "plateau", "plateau_validations": 1}
    recipe = write_recipe(root, settings)
    return lambda out: ["train-prior", recipe, "--tokens", store, "--out", out]


def wait_for(step: int, run: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until the run has logged update ``step`` or a later one."""
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in journal_lines(run)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.002)


def popen(words: list[Any], **more: Any) -> subprocess.Popen[str]:
    program = [DALLE, *map(str, words)] if words[0] != sys.executable else [str(word) for word in words]
    return subprocess.Popen(program, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_two_signals_one_after_another(command: Callable[[Path], list[Any]], tmp_path: Path, call: Call) -> None:
    undisturbed, signalled = tmp_path / "undisturbed", tmp_path / "signalled"
    assert call(*command(undisturbed)).code == 0
    last_saved = 0
    for which in (signal.SIGUSR1, signal.SIGTERM):
        process = popen(command(signalled))
        wait_for(last_saved + 50, signalled, [process])
        process.send_signal(which)
        process.send_signal(which)  # again, while it may be saving
        out, err = process.communicate(timeout=600)
        assert (process.returncode, out) == (RESUMABLE, "")
        assert "Traceback" not in err
        saved = open_checkpoint(signalled, which="last")
        assert last_saved + 50 <= saved.step < UPDATES
        assert err.splitlines()[-1] == (
            f"train-prior: stopped by {which.name}: saved {saved.path} of {UPDATES} updates; exit code 75; "
            "run the same command to resume"
        )
        last_saved = saved.step
    done = call(*command(signalled))
    assert done.code == 0
    assert f"resumes from step-{last_saved:08d}" in done.err
    last = f"step-{UPDATES:08d}"
    assert files(signalled / last) == files(undisturbed / last)
    assert journal_lines(signalled) == journal_lines(undisturbed)


def test_a_signal_to_one_rank_stops_all(command: Callable[[Path], list[Any]], tmp_path: Path, call: Call) -> None:
    undisturbed, signalled = tmp_path / "undisturbed", tmp_path / "signalled"
    processes = start([command(undisturbed)]) + start([command(signalled)])
    wait_for(40, signalled, processes[2:])
    processes[3].send_signal(signal.SIGUSR1)
    ended = outputs_of(processes, 600)
    assert [process.returncode for process in processes] == [0, 0, RESUMABLE, RESUMABLE], ended
    saved = open_checkpoint(signalled, which="last")
    assert 40 <= saved.step < UPDATES
    assert (
        ended[2][1]
        .splitlines()[-1]
        .startswith(f"train-prior: stopped by a signal to another rank: saved {saved.path} of {UPDATES} updates")
    )
    assert ended[3] == ("", "")
    # An update sends the gradients in 32 bit, three losses and the number of text tokens.
    numbers = sum(tensor.numel() for tensor in saved.tensors("raw").values())
    assert {line["bytes_communicated"] for line in journal_lines(undisturbed) if "loss" in line} == {
        4 * numbers + 3 * 4 + 8
    }
    again = start([command(signalled)])
    for process in again:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    last = f"step-{UPDATES:08d}"
    assert files(signalled / last) == files(undisturbed / last)
    assert journal_lines(signalled) == journal_lines(undisturbed)


def test_a_signal_to_the_process_group_leaves_no_worker(by_hand: Chain, tmp_path: Path) -> None:
    sets = ["--set", "dvae.training.updates=5000", "--set", "dvae.training.workers=2"]
    out = tmp_path / "dvae"
    process = popen(
        ["train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", out, *sets], start_new_session=True
    )
    wait_for(20, out, [process])
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == RESUMABLE, err
    assert "stopped by SIGTERM: saved" in err.splitlines()[-1]
    assert open_checkpoint(out).step >= 20
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "worker"])
def test_torchrun(to: str, command: Callable[[Path], list[Any]], tmp_path: Path) -> None:
    """SIGTERM to torchrun reaches all of its ranks, and SIGUSR1 to one of them stops all."""
    undisturbed, signalled = tmp_path / "undisturbed", tmp_path / "signalled"

    def torchrun(out: Path) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return popen([*launcher, DALLE, *command(out)])

    process = torchrun(undisturbed)
    assert process.wait(timeout=600) == 0, process.communicate()[1]
    process = torchrun(signalled)
    wait_for(40, signalled, [process])
    if to == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGUSR1)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "updates; exit code 75" in err
    last_saved = open_checkpoint(signalled, which="last").step
    assert 40 <= last_saved < UPDATES
    process = torchrun(signalled)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0
    assert f"resumes from step-{last_saved:08d}" in err
    last = f"step-{UPDATES:08d}"
    assert files(signalled / last) == files(undisturbed / last)
    assert journal_lines(signalled) == journal_lines(undisturbed)


def test_a_signal_that_comes_again_ends_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("dalle_cli.training.signals.time.monotonic", lambda: clock[0])
    with StopRequest() as stop:
        for clock[0] in (0.0, 1.0, SECONDS_TO_STOP - 0.1):  # a launcher and the batch system may both send it
            signal.raise_signal(signal.SIGTERM)
        clock[0] = 100.0
        signal.raise_signal(signal.SIGUSR1)  # another one, and the first of its kind
        stop.agreed = True  # an update has ended, and the checkpoint is being saved
        signal.raise_signal(signal.SIGTERM)
        stop.agreed = False
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
