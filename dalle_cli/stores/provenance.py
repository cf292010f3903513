"""Which command made an artifact: kept beside it, so that it can be traced and made again.

The folder of a run holds ``commands.jsonl``, one line for each command that finished an artifact in it. It is no part
of the artifacts, whose bytes do not depend on how they were asked for.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dalle_cli import __version__

JOURNAL = "commands.jsonl"


def command_line() -> str:
    """The command that is running, as a shell takes it."""
    return shlex.join(["dalle", *sys.argv[1:]])


def record_command(made: Path, sha256: str | None = None) -> None:
    """Add a line to the journal of the folder that ``made`` lies in, unless its last line for ``made`` says the same.

    ``made`` is a checkpoint, a store, a folder of samples or a tokenizer.json, ``sha256`` what identifies it. A
    journal that cannot be written hinders nothing.
    """
    folder = journal_folder(made)
    line = {
        "artifact": _name(made, folder),
        "sha256": sha256,
        "command": command_line(),
        "folder": os.getcwd(),
        "version": __version__,
    }
    try:
        earlier = commands_of(made)
        if earlier and all(earlier[-1].get(key) == value for key, value in line.items()):
            return
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({**line, "finished": finished}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"{folder / JOURNAL}: not written ({error.strerror}); {made} is whole", file=sys.stderr)


def commands_of(made: Path) -> list[dict[str, Any]]:
    """The journal's lines for an artifact, oldest first."""
    folder = journal_folder(made)
    return [line for line in read_commands(folder) if line["artifact"] == _name(made, folder)]


def read_commands(folder: Path) -> list[dict[str, Any]]:
    """All lines of a folder's journal; what a killed command left half-written is passed over."""
    lines = []
    try:
        texts = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("artifact"), str) and isinstance(line.get("command"), str):
            lines.append(line)
    return lines


def journal_folder(made: Path) -> Path:
    """The run's folder, as ``RunFolders`` lays it out: above steps, the tokenizer's folder, shares and samples."""
    made = made.resolve()
    folder = made.parent
    if made.name.startswith("step-") or made.name == "tokenizer.json":
        folder = folder.parent
    while folder.name.endswith(".parts") or folder.name == "samples":
        folder = folder.parent
    return folder


def _name(made: Path, folder: Path) -> str:
    return made.resolve().relative_to(folder).as_posix()
