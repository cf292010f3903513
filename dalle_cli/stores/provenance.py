"""Provenance: the commands that made the artifacts of a run, so that they can be traced and made again.

The folder of a run holds ``commands.jsonl``, one line for each command that finished an artifact in it. The artifacts
themselves do not hold the command, so that their bytes do not depend on how they were asked for.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dalle_cli import __version__
from dalle_cli.progress import log
from dalle_cli.stores.files import append_json_line, read_json_lines

JOURNAL = "commands.jsonl"


def command_line() -> str:
    """Return the running command, quoted for a shell."""
    return shlex.join(["dalle", *sys.argv[1:]])


def record_command(made: Path, sha256: str | None = None) -> None:
    """Add the running command to the journal of a run, unless the last line for the artifact is the same.

    ``made`` is the artifact: a checkpoint, a store, a folder of samples or a tokenizer.json; ``sha256`` identifies it.
    If the journal cannot be written, a message says so and the command continues.
    """
    folder = journal_folder(made)
    try:
        line = {
            "artifact": _name(made, folder),
            "sha256": sha256,
            "command": command_line(),
            "folder": os.getcwd(),
            "version": __version__,
        }
        earlier = commands_of(made)
        if earlier and all(earlier[-1].get(key) == value for key, value in line.items()):
            return
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        append_json_line(folder / JOURNAL, {**line, "finished": finished})
    except OSError as error:
        log(f"{folder / JOURNAL}: cannot be written ({error.strerror}); {made} is complete")


def commands_of(made: Path) -> list[dict[str, Any]]:
    """Return the journal's lines for an artifact, oldest first."""
    folder = journal_folder(made)
    return [line for line in read_commands(folder) if line["artifact"] == _name(made, folder)]


def read_commands(folder: Path) -> list[dict[str, Any]]:
    """Return all lines of a folder's journal except incomplete ones, which a killed command leaves."""
    return [
        line
        for line in read_json_lines(folder / JOURNAL)
        if isinstance(line.get("artifact"), str) and isinstance(line.get("command"), str)
    ]


def journal_folder(made: Path) -> Path:
    """Return the folder of the run (see ``RunFolders``) that an artifact lies in."""
    made = made.resolve()
    folder = made.parent
    if made.name.startswith("step-") or made.name == "tokenizer.json":
        folder = folder.parent
    while folder.name.endswith(".parts") or folder.name == "samples":
        folder = folder.parent
    return folder


def _name(made: Path, folder: Path) -> str:
    return made.resolve().relative_to(folder).as_posix()
