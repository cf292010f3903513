"""Pictures that a manifest names with their captions, one or several rows for each picture."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from dalle_cli.data.formats.tables import URL, BadRow, Row, Table
from dalle_cli.data.index import HASH_BYTES, group_by_hash, hash_members, hash_string
from dalle_cli.data.source import (
    BadSample,
    clean_captions,
    describe,
    is_unicode,
    read_image_file,
    size_of,
    split_extension,
)
from dalle_cli.errors import UserError
from dalle_cli.progress import log, printable
from dalle_cli.stores.files import sha256_file

_ROWS_BETWEEN_LOG_LINES = 1_000_000  # a few seconds
_PROBED = 100
"""Number of pictures whose files are looked for when a manifest is opened."""
_SIZED = 1000
"""Number of pictures whose sizes are part of the identity."""


class ManifestSource:
    """The pictures of a table in the order of their first rows; all rows of a picture contribute captions.

    A key is the value of the table's key column in the picture's first row. Without such a column it is the path
    without its extension, or with the extension if two paths differ in nothing else. Paths are relative to ``root``.
    The index takes 16 bytes for a picture and 8 bytes for each further row. Some pictures are looked for, unless
    ``probe`` is false.

    Raises:
        UserError: there is no picture, no picture's file can be found, or keys are not unique.
    """

    def __init__(self, name: str, format: str, table: Table, root: Path, *, probe: bool = True) -> None:
        self.name, self.format = name, format
        self.skipped: list[tuple[str, str]] = []
        self._table, self._root = table, root
        places, images, keys = array("q"), bytearray(), bytearray()
        urls = 0
        for count, row in enumerate(table.rows(), 1):
            if count % _ROWS_BETWEEN_LOG_LINES == 0:
                log(f"index {name}: {count:,} rows so far")
            row = row if isinstance(row, BadRow) else self._check(row)
            if isinstance(row, BadRow):
                self.skipped.append((row.where, row.reason))
                continue
            image = normal_path(row.image)
            urls += URL.match(image) is not None
            places.append(row.place)
            images += hash_string(image)
            keys += hash_string(row.key if table.key_column is not None else split_extension(image)[0])
        if not places:
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"{table.path}: names no pictures{why}")
        rows, self._offsets = group_by_hash(images)
        self._places = np.frombuffer(places, np.int64)[rows]
        first_rows = rows[self._offsets[:-1]]
        self._key_kind = self._tell_key_kind(
            np.frombuffer(keys, np.uint8).reshape(-1, HASH_BYTES)[first_rows].tobytes()
        )
        if probe:
            self._refuse_unreachable(only_urls=urls == len(places))
        self.identity = hash_members([(sha256_file(table.path), len(self)), *self._probed_sizes()])

    def _probed_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield the sizes of some pictures, spread over all, since there may be too many on a slow file system."""
        for i in np.linspace(0, len(self) - 1, min(len(self), _SIZED), dtype=int).tolist():
            image = normal_path(self._table.image(self._rows(i)[0]))
            with suppress(BadSample):  # it is not there, which is told when it is read
                yield image, size_of(self._root / image)

    def describe(self) -> str:
        return describe(self)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def key(self, i: int) -> str:
        place = self._rows(i)[0]
        if self._key_kind == "column":
            return self._table.key(place)
        image = normal_path(self._table.image(place))
        return image if self._key_kind == "path" else split_extension(image)[0]

    def captions(self, i: int) -> list[str]:
        return clean_captions(list(chain.from_iterable(self._table.captions(place) for place in self._rows(i))))

    def image_bytes(self, i: int) -> bytes:
        image = self._table.image(self._rows(i)[0])
        if URL.match(image):
            raise BadSample("is a URL: download the picture first and put its path in its place")
        return read_image_file(self._root / image, may_return=lambda: not self._root.is_dir())

    def _rows(self, i: int) -> list[int]:
        """Return the places of a picture's rows."""
        i = range(len(self))[i]
        return list(map(int, self._places[self._offsets[i] : self._offsets[i + 1]]))

    def _check(self, row: Row) -> Row | BadRow:
        """Return the row, or why it cannot be used; raise UserError if it has no value in the key column."""
        if not row.image:
            return BadRow(row.where, "names no picture")
        if "\0" in row.image or not is_unicode(row.image):
            return BadRow(row.where, f"the picture's path is not text in UTF-8 ({printable(row.image)!r})")
        if self._table.key_column is None:
            return row
        if not row.key:
            column = self._table.key_column
            raise UserError(f"{self._table.path}: {row.where}: the {column} is empty; fill it, or rename the column")
        return row if is_unicode(row.key) else BadRow(row.where, "the key is not UTF-8")

    def _tell_key_kind(self, keys: bytes) -> Literal["column", "stem", "path"]:
        """Return the kind of key that is unique for each picture, given the hashes of the pictures' keys."""
        pictures, offsets = group_by_hash(keys)
        unique = len(offsets) - 1 == len(pictures)
        if self._table.key_column is None:
            return "stem" if unique else "path"
        if not unique:
            repeated = offsets[np.flatnonzero(np.diff(offsets) > 1)[0]]
            first, second = (self._rows(i)[0] for i in pictures[repeated : repeated + 2].tolist())
            raise UserError(
                f"{self._table.path}: the {self._table.key_column} {self._table.key(first)!r} stands for two pictures, "
                f"{self._table.image(first)} and {self._table.image(second)}; give each its own, or rename the column"
            )
        return "column"

    def _refuse_unreachable(self, *, only_urls: bool) -> None:
        """Raise UserError at once if the pictures are elsewhere, rather than skip each of them later."""
        if only_urls:
            raise UserError(
                f"{self._table.path}: its pictures are URLs ({self._table.image(int(self._places[0]))} ...): download "
                "them first (img2dataset does, into shards that can be read here), or put their paths in their place"
            )
        count = len(self)
        probes = sorted({*range(min(count, _PROBED)), *np.linspace(0, count - 1, _PROBED, dtype=int).tolist()})
        paths = [self._table.image(self._rows(i)[0]) for i in probes]
        local = [path for path in paths if not URL.match(path)]
        if local and not any(os.path.isfile(self._root / path) for path in local):  # False if a name is too long
            raise UserError(
                f"{self._table.path}: none of its pictures exists (looked for {self._root / local[0]} ...); "
                "paths are relative to the manifest's folder"
            )


def normal_path(path: str) -> str:
    """Remove ./ and doubled slashes, so that a file has one name; links and .. are not resolved."""
    if URL.match(path) or not ("//" in path or "./" in path):
        return path
    return PurePosixPath(path).as_posix()
