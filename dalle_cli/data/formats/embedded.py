"""Parquet files that hold the pictures themselves, in the layouts of the Hugging Face Hub and of img2dataset.

A picture's column holds the files' bytes, or structs of ``bytes`` and ``path`` as the library ``datasets`` writes them.
The index holds the keys; captions are read when the first one is needed, pictures by row groups.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dalle_cli.data.copy_checksums import open_checked
from dalle_cli.data.formats.parquet import (
    check_captions,
    check_text,
    read_parquet,
    read_strings,
    read_texts,
    texts_of_row,
)
from dalle_cli.data.formats.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    KEY_COLUMNS,
    file_state,
    find_caption_columns,
    find_column,
)
from dalle_cli.data.index import PackedStrings, group_by_hash, hash_members, hash_string
from dalle_cli.data.source import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    BadSample,
    clean_captions,
    describe,
    split_extension,
)
from dalle_cli.errors import UserError

CACHED_BYTES = 512 << 20
"""Size of the row groups that a process keeps in memory. Reading a picture of any other group reads its whole group."""

_FOOTER_BYTES = 1 << 20
_SPLIT = re.compile(r"(.+?)-[0-9]+(?:-of-[0-9]+)?")
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")
"""Names of files that are splits without a number."""


class _File(NamedTuple):
    """A file of the source, with the columns that are read."""

    path: Path
    state: tuple[int, int]
    image: str
    """The column of bytes, such as "jpg" or "image.bytes"."""
    captions: list[str]
    key: str | None
    name: str | None
    """The column of the pictures' own file names, if there is one."""
    starts: list[int]
    """The first row of each row group, and the number of rows."""


class EmbeddedSource:
    """The pictures in Parquet files, in the order of the files and their rows.

    A key is the value of the column ``key`` or ``id``. Without one it is the picture's own file name without extension,
    if these differ, and else the number of the row, after the file's name if there are several files.

    Raises:
        UserError: a file cannot be read or has no captions, no picture is left, or keys are not unique.
    """

    format = "parquet"

    def __init__(self, name: str, paths: Sequence[Path], split: str | None = None) -> None:
        self.name, self._split = name, split
        self.skipped: list[tuple[str, str]] = []
        self._files = [_open(path) for path in paths]
        rows: list[np.ndarray] = []
        for number, file in enumerate(self._files):
            missing = _rows_without_picture(file)
            self.skipped += [(f"{file.path.name}, row {row + 1}", "holds no picture") for row in missing.tolist()]
            kept = np.setdiff1d(np.arange(file.starts[-1]), missing)
            rows.append(np.stack([np.full(len(kept), number), kept], axis=1))
        self._rows = np.concatenate(rows)
        if not len(self._rows):
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"{name}: holds no pictures{why}")
        self._keys = PackedStrings(self._unique_keys())
        self.identity = hash_members((file.path.name, file.state[0], _footer_hash(file.path)) for file in self._files)
        self._clear()

    def describe(self) -> str:
        split = f", split {self._split}" if self._split is not None else ""
        files = f" ({len(self._files)} files{split})" if len(self._files) > 1 or split else ""
        return describe(self) + files

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        number, row = self._rows[i].tolist()
        file = self._files[number]
        if number not in self._texts:
            self._texts[number] = read_texts(file.path, file.state, file.captions)
        return clean_captions(texts_of_row(self._texts[number], row))

    def image_bytes(self, i: int) -> bytes:
        number, row = self._rows[i].tolist()
        group = int(np.searchsorted(self._files[number].starts, row, side="right")) - 1
        with self._lock:
            pictures = self._group(number, group)
        data: bytes = pictures[row - self._files[number].starts[group]].as_py()
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample(f"the image is larger than {MAX_IMAGE_BYTES >> 20} MiB")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_texts", "_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def _clear(self) -> None:
        self._texts: dict[int, list[Any]] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def _group(self, number: int, group: int) -> Any:
        """Return the pictures of a row group, the latest of which stay in memory."""
        key = number, group
        if key not in self._groups:
            file = self._files[number]

            def read() -> Any:
                with pq.ParquetFile(open_checked(file.path)) as opened:
                    # One thread: Arrow's pool of threads does not survive the fork of a worker.
                    return opened.read_row_group(group, columns=[file.image], use_threads=False)

            table = read_parquet(file.path, file.state, read)
            self._groups[key] = _leaf(table.combine_chunks(), file.image)
            while len(self._groups) > 1 and sum(each.nbytes for each in self._groups.values()) > CACHED_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _unique_keys(self) -> list[str]:
        """Return a key for each row, from the first source of keys that is unique."""
        given = self._column("key")
        if given is not None:
            self._refuse_repeated(given)
            return given
        names = self._column("name")
        stems = [split_extension(name)[0] for name in names] if names is not None and all(names) else []
        if stems and _first_repeated(stems) is None:
            return stems
        several = len(self._files) > 1
        return [
            f"{self._files[number].path.stem}/{row:08d}" if several else f"{row:08d}"
            for number, row in self._rows.tolist()
        ]

    def _column(self, kind: str) -> list[str] | None:
        """Return the rows' values of the column of keys or of names; None if a file has no such column."""
        columns = [getattr(file, kind) for file in self._files]
        if None in columns:
            return None
        values = [list(read_strings(file.path, column)) for file, column in zip(self._files, columns, strict=True)]
        return [values[number][row] for number, row in self._rows.tolist()]

    def _refuse_repeated(self, keys: list[str]) -> None:
        """Raise UserError if a key is empty, or given twice."""
        for (number, row), key in zip(self._rows.tolist(), keys, strict=True):
            if not key:
                file = self._files[number]
                raise UserError(f"{file.path}: row {row + 1}: the {file.key} is empty; fill it, or rename the column")
        if (i := _first_repeated(keys)) is not None:
            file = self._files[self._rows[i, 0]]
            raise UserError(
                f"{self.name}: the {file.key} {keys[i]!r} stands for two pictures, the second one in {file.path.name}; "
                "give each its own, or rename the column"
            )


def open_embedded(name: str, files: Sequence[Path], wanted: str | None) -> EmbeddedSource | None:
    """Open Parquet ``files`` that hold pictures, all or those of a split; return None if they hold none.

    Files are of several splits if their names say so, as train-00000-of-00002 does. Of several, the split ``train`` is
    opened unless another one is ``wanted``.

    Raises:
        UserError: there is no split of that name, or none named train; see also ``EmbeddedSource``.
    """
    if _picture_column(_read_schema(files[0])) is None:
        return None
    split, chosen = choose_split(name, files, wanted)
    return EmbeddedSource(name, [files[i] for i in chosen], split)


def choose_split(name: str, files: Sequence[PurePath], wanted: str | None) -> tuple[str | None, list[int]]:
    """Return a split's name and the numbers of its files; all files, without a name, if they are of one split.

    Raises:
        UserError: there is no split of that name, or none named train.
    """
    splits: dict[str | None, list[int]] = {}
    for number, file in enumerate(files):
        splits.setdefault(_split_of(file), []).append(number)
    if wanted is None and len(splits) == 1:
        return None, list(range(len(files)))
    split = wanted or "train"
    if split not in splits:
        names = ", ".join(sorted(each for each in splits if each is not None)) or "none"
        raise UserError(
            f"{name}: has no split {split} (its splits: {names}); name one after a colon, as in FOLDER:test"
        )
    return split, splits[split]


def _footer_hash(path: Path) -> str:
    """Return a hash of a file's end, which holds sizes and statistics of all its columns."""
    with path.open("rb") as file:
        file.seek(max(0, os.stat(path).st_size - _FOOTER_BYTES))
        return sha256(file.read()).hexdigest()


def _split_of(file: PurePath) -> str | None:
    """Return the split that a file's name says, such as train of train-00000-of-00002; None if it says none."""
    if (match := _SPLIT.fullmatch(file.stem)) is not None:
        return match[1]
    return file.stem if file.stem in _SPLIT_NAMES else None


def _read_schema(path: Path) -> Any:
    try:
        return pq.read_schema(open_checked(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _picture_column(schema: Any) -> str | None:
    """Return the column of bytes of pictures: the first of a known name, or else the first of structs of bytes."""
    found = [column for field in schema if (column := _bytes_of(field)) is not None]
    known = find_column([column.partition(".")[0] for column in found], (*IMAGE_COLUMNS, *sorted(IMAGE_EXTENSIONS)))
    structs = (column for column in found if column.endswith(".bytes"))
    return next((column for column in found if column.partition(".")[0] == known), next(structs, None))


def _bytes_of(field: Any) -> str | None:
    """Return the name of a field's column of bytes, if it is bytes or a struct that holds ``bytes``."""
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        inside = field.type.get_field_index("bytes")
        if inside >= 0 and _is_bytes(field.type.field(inside).type):
            return f"{field.name}.bytes"
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open(path: Path) -> _File:
    """Find a file's columns and row groups."""
    state, schema = file_state(os.stat(path)), _read_schema(path)
    image = _picture_column(schema)
    if image is None:
        names = ", ".join(schema.names)
        raise UserError(f"{path}: holds no pictures, unlike the files beside it (its columns: {names})")
    captions = [name for name in find_caption_columns(schema.names) if name != image.partition(".")[0]]
    if not captions:
        raise UserError(
            f"{path}: has no column of captions (its columns: {', '.join(schema.names)}; looked for "
            f"{', '.join(CAPTION_COLUMNS)}, caption_0 ...)"
        )
    for caption in captions:
        check_captions(path, caption, schema.field(caption).type)
    key = find_column(schema.names, KEY_COLUMNS)
    if key is not None:
        check_text(path, key, schema.field(key).type, integers=True)
    column = image.partition(".")[0]
    named = image.endswith(".bytes") and schema.field(column).type.get_field_index("path") >= 0
    metadata = pq.read_metadata(open_checked(path))
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = [0, *np.cumsum(sizes).tolist()]
    return _File(path, state, image, captions, key, f"{column}.path" if named else None, starts)


def _rows_without_picture(file: _File) -> np.ndarray:
    """Return the rows whose picture is null; only row groups that may hold such rows are read."""
    missing: list[np.ndarray] = []
    with pq.ParquetFile(open_checked(file.path)) as opened:
        for group in range(opened.metadata.num_row_groups):
            if _null_count(opened.metadata.row_group(group), file.image) != 0:
                pictures = _leaf(opened.read_row_group(group, columns=[file.image]).combine_chunks(), file.image)
                missing.append(file.starts[group] + np.flatnonzero(pictures.is_null().to_numpy(zero_copy_only=False)))
    return np.concatenate(missing) if missing else np.empty(0, np.int64)


def _null_count(group: Any, column: str) -> int | None:
    """Return the number of nulls of a column in a row group as its statistics say; None if they do not say it."""
    chunks = (group.column(i) for i in range(group.num_columns))
    statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == column)
    return statistics.null_count if statistics is not None and statistics.has_null_count else None


def _leaf(table: Any, column: str) -> Any:
    """Return the array of a column such as "jpg" or "image.bytes" of a table in one chunk."""
    name, _, inside = column.partition(".")
    whole = table.column(name)
    array = whole.chunk(0) if whole.num_chunks else pa.array([], whole.type)
    return pc.struct_field(array, inside) if inside else array


def _first_repeated(keys: list[str]) -> int | None:
    """Return the place of a key that an earlier one equals; None if all differ."""
    items, offsets = group_by_hash(b"".join(hash_string(key) for key in keys))
    repeated = np.flatnonzero(np.diff(offsets) > 1)
    return int(items[offsets[repeated[0]] + 1]) if len(repeated) else None
