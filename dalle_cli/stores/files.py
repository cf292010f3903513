"""Reading and writing files so that a reader sees the old one or the new one, never half of one; locks.

All text is UTF-8, whatever the locale.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dalle_cli.errors import UserError, explain_system_error
from dalle_cli.progress import log

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of formulas in spreadsheets (OWASP, "CSV injection")."""
SECONDS_FOR_WORKERS = 5.0
"""Seconds that workers of a killed process, or a stopped one, may hold a lock before another process is refused."""
SECONDS_IN_SILENCE = 0.5
"""Seconds for which a process waits for a lock before it says so."""
PATIENCE = 600.0
"""Seconds that one process may hold a lock that others need for a moment, even if its disk is slow."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in the way into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(explain_system_error(OSError(error.errno, os.strerror(error.errno), str(path)))) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{path}: may not be written ({error.strerror}); choose another place") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{path}: a file is in the way of a folder; choose another place") from error
        raise


def sync(*paths: Path) -> None:
    """Have the system write files, and the entries of folders, to the disk, so that a power cut does not lose them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems cannot sync folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def rename_synced(beside: Path, path: Path) -> None:
    """Put ``beside``, a file or folder, in the place of ``path`` once all of it is on the disk."""
    sync(beside, *(beside.rglob("*") if beside.is_dir() else ()))
    if beside.is_dir() and path.exists():  # a file never takes the place of a folder
        shutil.rmtree(path)
    beside.replace(path)
    sync(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write ``data`` beside ``path`` and rename it into place; text goes through ``encoded``.

    A link stays one: its target is replaced. A pipe or a device, such as /dev/null, is written to and stays too.

    Raises:
        UserError: ``path`` is a folder, or may not be written; the disk is full.
    """
    content = encoded(data) if isinstance(data, str) else data
    with explain_os_errors(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        place = Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        # Processes of two containers that share a folder may have the same number.
        beside = place.with_name(f".{place.name}.{os.getpid()}{secrets.randbelow(10**6):06d}")
        try:
            beside.write_bytes(content)
            rename_synced(beside, place)
        finally:
            beside.unlink(missing_ok=True)


def encoded(text: str) -> bytes:
    r"""Return ``text`` in UTF-8, with escapes, such as ``\udce9``, for bytes of names that are not."""
    return text.encode("utf-8", "backslashreplace")


def delete_unfinished(folder: Path) -> None:
    """Delete what processes that were killed in ``write_atomically`` left in a folder that this process owns."""
    for left in folder.glob(".*"):
        if left.suffix[1:].isdigit():  # the number of the process
            left.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON with sorted keys, as ``write_json`` writes it."""
    return encoded(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").decode()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as ``json_text``."""
    write_atomically(path, json_text(value))


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV; an apostrophe goes before texts that a spreadsheet would run as formulas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_plain_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _plain_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    guarded = f"'{cell}" if cell.startswith(_FORMULA) else cell
    return guarded.replace("\r", "\n")  # csv quotes the line feed alone


def user_cache(name: str) -> Path:
    """Return the folder ``name`` of dalle's in the user's cache folder.

    Raises:
        UserError: the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / name
    except RuntimeError as error:
        raise UserError(f"XDG_CACHE_HOME: is not set, and there is no home ({error}); set it to a folder") from None


def plain_name(text: str) -> str:
    """Return ``text`` for a file's name: each run of characters that are no letters, digits, _, . or - becomes a _."""
    return re.sub(r"[^\w.-]+", "_", text)


def split_lines(text: str) -> list[str]:
    """Split text at ends of lines alone, since a name or a JSON string may hold other separators, such as U+2028."""
    return re.split("\r\n|\r|\n", text)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a journal, without lines that a killed process left incomplete; none without the file."""
    if not path.is_file():
        return []
    found = []
    for line in split_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append_json_line(path: Path, value: Any) -> None:
    """Append ``value`` to a journal as a line of its own, even if a killed process left the last line incomplete."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + encoded(json.dumps(value, ensure_ascii=False)) + b"\n")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory that becomes ``path`` when the block succeeds and is deleted when it fails."""
    beside = path.with_name(f".{path.name}.partial")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            rename_synced(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Keep other processes from writing ``path``, a file or folder, by a lock beside it that names this process.

    Workers that were forked meanwhile hold the lock too. Those of a process that was killed are waited for, since they
    notice it within a second; see ``locked``.

    Raises:
        UserError: another process is writing it.
    """
    place = path.resolve()
    with locked(place.with_name(f".{place.name}.lock"), f"{path}:", patience=0):
        yield


@contextmanager
def locked(
    path: Path, what: str, *, patience: float = PATIENCE, sign_of_life: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which names this process and is deleted when the block ends.

    A line on stderr says which process is waited for. No process is waited for without end, since it may have been
    stopped or hang.

    Args:
        path: the lock.
        what: begins the messages, which go on with "is being written by process 123 on host".
        patience: seconds that one process may hold the lock. One that has ended, so that its workers hold the lock, or
            that is stopped may hold it for SECONDS_FOR_WORKERS, whatever the patience is.
        sign_of_life: returns what changes as long as the process that holds the lock gets on; then it has more time.

    Raises:
        UserError: another process holds the lock for longer, or the file system has no locks.
    """
    began = since = time.monotonic()
    seen: tuple[_Holder, object] | None = None
    told, pause = False, 0.001
    while (file := _lock(path)) is None:
        holder = _Holder.of(_owner(path), path)
        if (now := (holder, sign_of_life())) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since >= (patience if holder.works else SECONDS_FOR_WORKERS):
            raise UserError(f"{what} is being written by {holder.name}; {holder.mend}")
        if not told and time.monotonic() - began >= SECONDS_IN_SILENCE:
            log(f"{what} is being written by {holder.name}; waiting for it")
            told = True
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    with file:
        try:
            with suppress(OSError):  # a full disk, of which the lock's holder may be about to free some
                file.truncate(0)
                os.write(file.fileno(), _name_of(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Holder:
    """A process that holds a lock, in words, what to do about it, and whether it is known to be working."""

    name: str
    mend: str
    works: bool = False

    @classmethod
    def of(cls, owner: str, lock: Path) -> _Holder:
        """Describe the process whose name, see ``_name_of``, is in a lock; the name is missing for a moment."""
        if not owner:
            return cls("another process", "wait for it, or end it")
        number = owner.removeprefix("process ").partition(" ")[0]
        if number.isdecimal() and owner == _name_of(int(number)):
            if _has_ended(int(number)):
                return cls(f"a worker of {owner}, which has ended", f"end it too (lsof {lock} names it)")
            if _state(int(number)) in ("T", "t"):
                return cls(f"{owner}, which is stopped", f"let it go on (kill -CONT {number}), or end it")
        return cls(owner, "wait for it, or end it", works=True)


def _name_of(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"


def _owner(lock: Path) -> str:
    """Return the name of the process that holds a lock, "" if it has not written it yet."""
    with suppress(OSError):
        return lock.read_text(encoding="utf-8", errors="replace")
    return ""


def _has_ended(process: int) -> bool:
    """Return whether a process of this machine has ended, even if its parent has not taken notice."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return _state(process) in ("Z", "X")


def _state(process: int) -> str:
    """Return the letter of the state of a process of this machine, such as T for a stopped one, "" without /proc."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return ""


def _lock(path: Path) -> BinaryIO | None:
    """Return the locked file; None if another process holds it, or deletes it or its folder meanwhile.

    Raises:
        UserError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        file.close()
        raise UserError(f"{path}: cannot be locked ({error.strerror}); use a file system with locks") from None
    file.close()
    return None
