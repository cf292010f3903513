"""Commands that are killed before each of their first writing operations resume to the bytes of undisturbed ones."""

from __future__ import annotations

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

from dalle_cli.app import main

POINTS = 60
WRITING = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"})
UNSTABLE = ("commands.jsonl", "metrics.jsonl", "events")
"""Files that say when something happened."""


def in_a_fork(arguments: list[str], kill_at: int | None) -> int:
    """Run a command in a fork of this process, which has imported all it needs; return its exit status.

    The fork kills itself before its ``kill_at``-th operation that opens a file for writing, renames, makes or removes.
    """
    if (child := os.fork()) == 0:
        try:
            if kill_at is not None:
                sys.addaudithook(killer(kill_at))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.argv = ["dalle", *arguments]
            main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killer(at: int) -> Callable[[str, Any], None]:
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
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def killed_and_resumed(command: Callable[[Path], list[str]], folder: Path) -> int:
    """Kill the command at each of POINTS operations and run it again; return at how many of them it died."""
    assert in_a_fork(command(folder / "undisturbed"), None) == 0
    wanted = {name: digest for name, digest in files(folder / "undisturbed").items() if not unstable(name)}
    died = 0
    for at in range(1, POINTS + 1):
        out = folder / f"at-{at}"
        status = in_a_fork(command(out), at)
        assert status in (0, signal.SIGKILL), (at, status)
        died += status == signal.SIGKILL
        assert in_a_fork(command(out), None) == 0, at
        found = {name: digest for name, digest in files(out).items() if not unstable(name)}
        assert found == wanted, at
    return died


def unstable(name: str) -> bool:
    return any(part in name for part in UNSTABLE) or Path(name).name.startswith(".")


def test_make_shapes(tmp_path: Path) -> None:
    assert killed_and_resumed(
        lambda out: ["make-shapes", str(out), "--n", "6", "--test-n", "2", "--size", "32"], tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize-text", "encode-images", "train-prior", "sample"])
def test_stages(by_hand: Chain, tmp_path: Path, command: str) -> None:
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
    assert killed_and_resumed(commands[command], tmp_path)
