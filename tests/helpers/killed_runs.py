"""Commands that are killed at a chosen moment, and the files and journals that they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from dalle_cli.training.throughput import THROUGHPUT_KEYS
from helpers.running import DALLE, ENVIRONMENT

TIMED = frozenset({"seconds", *THROUGHPUT_KEYS})
"""Values in the journal that differ between two runs of the same recipe."""


SHARD = 64


# A shard has 4096 rows. Smaller ones give a small store many, by the same code.
SMALL_SHARDS = (
    "from dalle_cli.stores import tokens; "
    f"tokens.ROWS_PER_BLOCK = tokens.ROWS_PER_CHUNK = {SHARD}; "
    "from dalle_cli.text import tokenize; tokenize.SHARDS_AT_ONCE = 1; "
    "from dalle_cli.app import main; main()"
)


Command = Sequence[object]


def finish(command: Command, program: Sequence[str] = (DALLE,)) -> str:
    """Run ``command`` to its end and return its stdout."""
    done = subprocess.run([*program, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(
    command: Command,
    ready: Callable[[], bool],
    delay: float,
    program: Sequence[str] = (DALLE,),
    patience: float = 60,
) -> bool:
    """Run ``command`` and kill it ``delay`` seconds after ``ready``; return False if it ended before."""
    process = subprocess.Popen(
        [*program, *map(str, command)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + patience
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the command makes no progress"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def files(folder: Path, *without: str) -> dict[str, str]:
    """Return the sha256 of every file below ``folder``."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in found.items() if name not in without}


def journal_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the run's journal without TIMED; none if there is no journal yet."""
    file = run / "metrics.jsonl"
    found = file.read_text().splitlines() if file.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in found]
