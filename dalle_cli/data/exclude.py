"""A source without the samples that a file names, such as the duplicates that ``dalle overlap`` found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from dalle_cli.data.index import hash_members
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError
from dalle_cli.stores.files import split_lines


class SourceWithExclusions:
    """A source without the samples in ``file``: they keep their rows, but reading them raises BadSample.

    Its identity depends on the file, so that an artifact made with one exclusion is not resumed with another.

    Raises:
        UserError: ``file`` cannot be read, or none of its keys is in ``source``.
    """

    def __init__(self, source: Source, file: Path) -> None:
        keys, sha256 = read_keys(file)
        self.source, self.format, self.skipped = source, source.format, source.skipped
        self.name = f"{source.name} without {file.name} ({sha256[:12]})"
        self.identity = hash_members([(source.identity, sha256)])
        self._file, self._reason = file, f"excluded: {file.name}"
        self._excluded = np.fromiter((source.key(i) in keys for i in range(len(source))), bool, len(source))
        self.count = int(self._excluded.sum())
        require_match(file, keys, self.count, source.name)

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
        if self._excluded[i]:
            raise BadSample(self._reason)


def read_keys(file: Path, option: str = "data.exclude") -> tuple[set[str], str]:
    """Read the keys of a .jsonl file (an object with a "key" a line) or of a text file (a key a line), and its SHA-256.

    ``option`` is the setting that names the file.

    Raises:
        UserError: the file cannot be read, or a line is not an object with a "key".
    """
    try:
        data = file.read_bytes()
        lines = [line for line in split_lines(data.decode("utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {file}: cannot be read: {error}") from None
    if file.suffix == ".jsonl":
        lines = [_key(line, file, number) for number, line in enumerate(lines, 1)]
    return set(lines), hashlib.sha256(data).hexdigest()


def require_match(file: Path, keys: set[str], matches: int, place: str) -> None:
    """Raise UserError if the keys of ``file`` match nothing in ``place``, unless there are none."""
    if keys and not matches:
        raise UserError(f"{file}: none of its {len(keys)} keys is in {place}; give one made for it")


def _key(line: str, file: Path, number: int) -> str:
    try:
        key = json.loads(line)["key"]
    except (ValueError, TypeError, KeyError):
        key = None
    if not isinstance(key, str):
        raise UserError(
            f'{file}:{number}: is not an object with a "key"; give the lines of dalle overlap, or a .txt of keys'
        )
    return key
