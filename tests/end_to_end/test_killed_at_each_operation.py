"""Commands that are killed before each of their first writing operations, or whose operation fails there, resume.

They end with the bytes of undisturbed ones, and a fault of the disk is one line.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.killed_runs import files
from helpers.running import Chain

from dalle_cli.app import run_arguments

POINTS = 60
UNDISTURBED = 5
"""Number of undisturbed runs in a row that show that a command has no further operations."""
FAULTS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES)
WRITING = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"})
UNSTABLE = ("commands.jsonl", "metrics.jsonl", "events")
"""Files that say when something happened."""


def in_a_fork(arguments: list[str], at: int = 0, fault: int | None = None, stderr: Path = Path(os.devnull)) -> int:
    """Run a command in a fork of this process, which has imported all it needs; return its exit status.

    At its ``at``-th operation that opens a file for writing, renames, makes or removes, the fork kills itself, or the
    operation fails with the error number ``fault``.
    """
    if (child := os.fork()) == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not pytest's
            if at:
                sys.addaudithook(disturber(at, fault))
            sys.argv = ["dalle", *arguments]
            run_arguments()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def disturber(at: int, fault: int | None) -> Callable[[str, Any], None]:
    seen = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal seen
        writes = event in WRITING
        if event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and b"/dev/" not in os.fsencode(
                arguments[0]
            )
        seen += writes
        if writes and seen == at:
            if fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(fault, os.strerror(fault), os.fsdecode(arguments[0]))

    return hook


def killed_and_resumed(command: Callable[[Path], list[str]], folder: Path) -> int:
    """Kill the command at each of its first POINTS operations and run it again; return at how many of them it died."""
    assert in_a_fork(command(folder / "undisturbed")) == 0
    wanted = {name: digest for name, digest in files(folder / "undisturbed").items() if not unstable(name)}
    died = undisturbed = 0
    for at in range(1, POINTS + 1):
        if undisturbed == UNDISTURBED:
            break
        out = folder / f"at-{at}"
        status = in_a_fork(command(out), at)
        # A command whose worker was killed ends with exit code 2.
        assert status in (0, signal.SIGKILL, 2 << 8), (at, status)
        died += status != 0
        undisturbed = undisturbed + 1 if status == 0 else 0
        assert in_a_fork(command(out)) == 0, at
        found = {name: digest for name, digest in files(out).items() if not unstable(name)}
        assert found == wanted, at
    return died


def failed_and_resumed(command: Callable[[Path], list[str]], folder: Path, points: int) -> int:
    """Let each of ``points`` operations fail and run the command again; return how many failures ended it."""
    assert in_a_fork(command(folder / "undisturbed")) == 0
    wanted = {name: digest for name, digest in files(folder / "undisturbed").items() if not unstable(name)}
    ended, told = 0, folder / "stderr.txt"
    for at in range(1, points + 1):
        out = folder / f"at-{at}"
        status = os.waitstatus_to_exitcode(in_a_fork(command(out), at, FAULTS[at % len(FAULTS)], told))
        assert status in (0, 2), (at, status, told.read_text())
        assert "Traceback" not in told.read_text(), at
        if status == 2:
            (line,) = [line for line in told.read_text().splitlines() if line.startswith("dalle: ")]
            assert "; " in line, at
            ended += 1
        assert in_a_fork(command(out)) == 0, at
        found = {name: digest for name, digest in files(out).items() if not unstable(name)}
        assert found == wanted, at
    return ended


def unstable(name: str) -> bool:
    return any(part in name for part in UNSTABLE) or Path(name).name.startswith(".")


def shapes_into(out: Path) -> list[str]:
    return ["make-shapes", str(out), "--n", "6", "--test-n", "2", "--size", "32"]


def test_make_shapes(tmp_path: Path) -> None:
    for module in ("dalle_cli.shapes.panels", "dalle_cli.shapes.world"):
        importlib.import_module(module)  # once for all forks
    assert killed_and_resumed(shapes_into, tmp_path / "killed")
    assert failed_and_resumed(shapes_into, tmp_path / "failed", POINTS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", ["kill", "fail"])
@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize-text", "encode-images", "train-prior", "sample"])
def test_stages(by_hand: Chain, tmp_path: Path, command: str, disturb: str) -> None:
    data, recipe = ["--data", str(by_hand.train)], str(by_hand.recipe)
    commands: dict[str, Callable[[Path], list[str]]] = {
        "train-tokenizer": lambda out: ["train-tokenizer", recipe, *data, "--out", str(out)],
        "tokenize-text": lambda out: [
            "tokenize-text", recipe, *data, "--tokenizer", str(by_hand.tokenizer), "--tokens", str(out)
        ],
        "encode-images": lambda out: [
            "encode-images", recipe, *data, "--dvae", str(by_hand.dvae), "--tokens", str(out)
        ],
        "train-prior": lambda out: ["train-prior", recipe, "--tokens", str(by_hand.tokens), "--out", str(out)],
        "sample": lambda out: ["sample", str(by_hand.prior), "a red star", "--n", "2", "--out", str(out)],
    }  # fmt: skip
    if disturb == "kill":
        assert killed_and_resumed(commands[command], tmp_path)
    else:
        assert failed_and_resumed(commands[command], tmp_path, POINTS)
