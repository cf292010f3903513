"""Copies of files on servers in a folder of this machine, which is bounded: the least recently used copies go."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

from dalle_cli.data.copy_checksums import checksums_of, delete_copy, keep_checksums
from dalle_cli.data.remote import RemoteFile
from dalle_cli.data.servers import State
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import (
    append_json_line,
    explain_os_errors,
    locked,
    read_json_lines,
    rename_synced,
    user_cache,
)

CACHE = "DALLE_CACHE"
"""Environment variable that names the folder of copies."""
CACHE_GB = "DALLE_CACHE_GB"
"""Environment variable of the largest size of all copies in it, in 10^9 bytes."""
FREE = 0.1
"""Share of the disk that copies leave free, unless CACHE_GB says how large they may be."""
_JOURNAL = "dalle-copies.jsonl"
"""Name of the list of copies in the folder. Nothing else there is ever deleted."""


class NoRoom(UserError):
    """The copies are larger than the folder may become."""


def local_copies(files: Sequence[RemoteFile]) -> list[Path]:
    """Return a copy of each file in the folder that CACHE names, or ``~/.cache/dalle/remote``; download missing ones.

    Where they need room, copies of other files are deleted, the least recently used ones first. Checksums lie
    beside each copy, see ``copy_checksums``.

    Raises:
        UserError: a file cannot be reached, or the folder cannot be written; NoRoom if the copies are too large for it.
    """
    folder = Path(os.environ.get(CACHE) or user_cache("remote"))
    copies = [_place(folder, file) for file in files]
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        missing = {copy: file.state() for copy, file in zip(copies, files, strict=True) if not copy.is_file()}
        with _list_locked(folder):
            _make_room(folder, copies, {copy: state.size for copy, state in missing.items()})
        for copy, file in zip(copies, files, strict=True):
            if not copy.is_file():
                _download(folder, file, copy, missing.get(copy) or file.state())
            elif not checksums_of(copy).is_file():  # of an earlier version, which kept none
                keep_checksums(copy, copy)
    return copies


def _place(folder: Path, file: RemoteFile) -> Path:
    if ".." in file.path.parts:
        raise UserError(f"{file}: leads out of its folder; write the address without ..")
    # The folders are those of the address, since they are part of the samples' keys.
    return folder / file.url.partition("://")[0] / str(file.path).lstrip("/")


def _make_room(folder: Path, wanted: Sequence[Path], missing: dict[Path, int]) -> None:
    """Delete copies until those that are missing fit in; mark the others of ``wanted`` as used now."""
    for copy in wanted:
        if copy not in missing:
            os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))  # the other time tells versions apart
    known = {folder / str(line.get("copy")) for line in read_json_lines(folder / _JOURNAL)}
    for copy in set(wanted) - missing.keys() - known:  # of an earlier version, which kept no list
        known.add(_list(folder, copy))
    there = {copy: copy.stat() for copy in known if copy.is_file()}
    size = sum(facts.st_size for facts in there.values())
    most, needed = _most(folder, size), sum(missing.values())
    own = sum(copy.stat().st_size for copy in set(wanted) - missing.keys())
    if own + needed > most:
        raise NoRoom(
            f"{folder}: has room for {max(0.0, most) / 1e9:.1f} GB of copies, and these {len(wanted)} files take "
            f"{(own + needed) / 1e9:.1f}; name another folder by {CACHE}, or raise {CACHE_GB}"
        )
    for copy in sorted(there.keys() - set(wanted), key=lambda copy: there[copy].st_atime_ns):
        if size + needed <= most:
            break
        log(f"{copy}: was not used for the longest time, and makes room")
        delete_copy(copy)
        size -= there[copy].st_size


def _most(folder: Path, size: int) -> float:
    """Return the number of bytes that copies may take, where they take ``size`` now."""
    if (text := os.environ.get(CACHE_GB)) is None:
        disk = shutil.disk_usage(folder)
        return size + disk.free - FREE * disk.total
    try:
        most = float(text) * 1e9
    except ValueError:
        most = -1.0
    if not 0 <= most < float("inf"):
        raise UserError(f"{CACHE_GB}: is {text!r}; give the number of gigabytes, such as 500")
    return most


def _download(folder: Path, file: RemoteFile, copy: Path, state: State) -> None:
    with ExitStack() as held:
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Named after the version too, or the rest of one would be joined to the beginning of another.
        version = hashlib.sha256(state.mark.encode()).hexdigest()[:8]
        partial = copy.with_name(f"{copy.name}.{state.size}.{version}.partial")
        lock = copy.with_name(f"{copy.name}.lock")
        held.enter_context(locked(lock, f"{copy}:", sign_of_life=lambda: _size(partial)))
        if copy.is_file():  # another process was faster
            return
        log(f"{file}: {state.size:,} bytes, into {copy}")
        with partial.open("ab") as out:  # goes on with what an earlier process downloaded
            out.truncate(min(out.tell(), state.size))
            out.seek(0, os.SEEK_END)
            file.download(out, state.size)
        keep_checksums(partial, copy)
        with _list_locked(folder):
            _list(folder, copy)
        rename_synced(partial, copy)
        for left in copy.parent.glob(f"{glob.escape(copy.name)}.*.partial"):  # of other versions
            left.unlink(missing_ok=True)


def _size(file: Path) -> int:
    """Return the number of bytes of a file that may be missing."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _list_locked(folder: Path) -> AbstractContextManager[None]:
    return locked(folder / f"{_JOURNAL}.lock", f"{folder / _JOURNAL}:")


def _list(folder: Path, copy: Path) -> Path:
    """Add a copy to the list of those that may be deleted, and return it."""
    append_json_line(folder / _JOURNAL, {"copy": copy.relative_to(folder).as_posix()})
    return copy
