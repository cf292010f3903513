"""A source without the samples that a file names, such as the duplicates that ``dalle overlap`` found.

Keys are compared by their hashes, so that those of a file of millions take 16 bytes each. The rows of a large source
that are left out are kept in the user's cache, a bit for each row, so that later commands need not read all keys again.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.index import HASH_BYTES, hash_members, hash_string
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import available_cores, map_blocks, split_blocks
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.files import locked, sha256_file, split_lines, user_cache
from dalle_cli.stores.row_set import BLOCK, LARGE, RowSet, keep_bits, read_bits

_AT_ONCE = 16 * BLOCK
"""Number of rows whose keys are looked up together."""
_PROBED = 100
"""Number of rows, spread over a source, whose keys must be those for which its excluded rows were kept."""


class SourceWithExclusions:
    """A source without the samples in ``file``: they keep their rows, but reading them raises BadSample.

    Its identity depends on the file, so that an artifact made with one exclusion is not resumed with another.

    Raises:
        UserError: ``file`` cannot be read, or none of its keys is in ``source``.
    """

    def __init__(self, source: Source, file: Path) -> None:
        self._bits, sha256 = _excluded_bits(source, file)
        self.source, self.format, self.skipped = source, source.format, source.skipped
        self.name = f"{source.name} without {file.name} ({sha256[:12]})"
        self.identity = hash_members([(source.identity, sha256)])
        self._file, self._reason = file, f"excluded: {file.name}"
        self.count = len(RowSet(self._bits))

    def describe(self) -> str:
        return f"{self.source.describe()}, {self.count} excluded by {self._file}"

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def captions(self, i: int) -> list[str]:
        self._check(i)
        return self.source.captions(i)

    def image_bytes(self, i: int) -> bytes:
        self._check(i)
        return self.source.image_bytes(i)

    def _check(self, i: int) -> None:
        i = range(len(self))[i]
        if self._bits[i // 8] >> i % 8 & 1:
            raise BadSample(self._reason)


class KeySet:
    """A set of keys, held as their sorted hashes of HASH_BYTES bytes each."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = np.unique(_hashes(keys))

    def __len__(self) -> int:
        return len(self._hashes)

    def contains(self, keys: Iterable[str]) -> NDArray[np.bool_]:
        """Return whether each of ``keys`` is in the set, (n,)."""
        wanted = _hashes(keys)
        if not len(self):
            return np.zeros(len(wanted), bool)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        found: NDArray[np.bool_] = self._hashes[places] == wanted
        return found


def read_keys(file: Path, option: str = "data.exclude", digest: hashlib._Hash | None = None) -> Iterator[str]:
    """Yield the keys of a .jsonl file (an object with a "key" a line) or of a text file (a key a line).

    ``option`` is the setting that names the file; ``digest`` is updated with all bytes of the file.

    Raises:
        UserError: the file cannot be read, or a line is not an object with a "key".
    """
    number = 0
    with _explain(option, file), file.open("rb") as opened:
        for bytes_read in opened:
            if digest is not None:
                digest.update(bytes_read)
            text = (bytes_read if number else bytes_read.removeprefix(codecs.BOM_UTF8)).decode()
            for line in split_lines(text.removesuffix("\n").removesuffix("\r")):
                number += 1
                if line.strip():
                    yield _key(line, file, number) if file.suffix == ".jsonl" else line


def require_match(file: Path, keys: int, matches: int, place: str) -> None:
    """Raise UserError if the ``keys`` keys of ``file`` match nothing in ``place``, unless there are none."""
    if keys and not matches:
        raise UserError(f"{file}: none of its {keys} keys is in {place}; give one made for it")


def _excluded_bits(source: Source, file: Path) -> tuple[NDArray[np.uint8], str]:
    """Return a bit for each row of ``source``, lowest first, that is 1 if ``file`` names the row's key.

    Returns:
        (ceil(rows / 8),) uint8, and the SHA-256 of the file.
    """
    if file.exists() and not file.is_file():  # a pipe would be empty for the command that comes next
        raise UserError(f"data.exclude: {file}: is no ordinary file; write the keys into one")
    if len(source) < LARGE:
        return _find_excluded(source, file)
    with _explain("data.exclude", file):
        sha256 = sha256_file(file)
    made_of = _made_of(source, sha256)
    kept = _kept_file(made_of)
    if kept is None:
        return _find_excluded(source, file)
    with ExitStack() as held:
        with suppress(OSError, UserError):  # each process searches where nothing can be kept
            # One process searches, and the others, such as the ranks of a training, take what it found.
            held.enter_context(locked(kept.with_suffix(".lock"), f"{kept}:"))
        if (bits := read_bits(kept, made_of, len(source))) is None:
            bits, found = _find_excluded(source, file)
            if found != sha256:  # the file was replaced meanwhile
                return bits, found
            keep_bits(kept, made_of, bits)
    return bits, sha256


def _find_excluded(source: Source, file: Path) -> tuple[NDArray[np.uint8], str]:
    """Return what ``_excluded_bits`` returns, from all keys of the source and the file."""
    digest = hashlib.sha256()
    keys = KeySet(read_keys(file, digest=digest))
    blocks, found = split_blocks(range(len(source)), _AT_ONCE), [np.empty(0, np.uint8)]
    large = len(source) >= LARGE
    with progress("exclude", len(source), "keys") if large else nullcontext() as bar:
        matches = map_blocks(
            partial(_match, source, keys), blocks, available_cores() if large else 1, "run the same command again"
        )
        for block, bits in zip(blocks, matches, strict=True):
            found.append(bits)
            if bar is not None:
                bar.advance(len(block))
    every = np.concatenate(found)
    require_match(file, len(keys), len(RowSet(every)), source.name)
    return every, digest.hexdigest()


def _match(source: Source, keys: KeySet, block: range) -> NDArray[np.uint8]:
    return np.packbits(keys.contains(map(source.key, block)), bitorder="little")


def _made_of(source: Source, sha256: str) -> str:
    """Return a hash of all that the rows left out depend on: the keys and their order, and the file."""
    probed = np.linspace(0, len(source) - 1, _PROBED, dtype=int).tolist()
    facts = (source.identity, len(source), sha256)
    return hash_members([facts, *source.skipped, *((source.key(row),) for row in probed)])


def _kept_file(made_of: str) -> Path | None:
    """Return the place of the bits that are kept; None for a user without a home."""
    with suppress(UserError):
        return user_cache("exclude") / f"{made_of}.bits"
    return None


def _hashes(keys: Iterable[str]) -> NDArray[np.bytes_]:
    found = bytearray()
    for key in keys:
        found += hash_string(key)
    return np.frombuffer(found, f"S{HASH_BYTES}")


@contextmanager
def _explain(option: str, file: Path) -> Iterator[None]:
    """Turn an error in reading the file that ``option`` names into a UserError."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {file}: cannot be read: {error}") from None


def _key(line: str, file: Path, number: int) -> str:
    try:
        key = json.loads(line)["key"]
    except (ValueError, TypeError, KeyError, RecursionError):
        key = None
    if not isinstance(key, str):
        raise UserError(
            f'{file}:{number}: is not an object with a "key"; give the lines of dalle overlap, or a .txt of keys'
        )
    return key
