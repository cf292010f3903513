"""Parquet manifests: paths are kept in memory, and captions are read when the first one is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dalle_cli.data.copy_checksums import open_checked
from dalle_cli.data.formats.tables import BadRow, Row, changed, file_state, find_columns, looked_for
from dalle_cli.data.index import PackedStrings
from dalle_cli.data.source import BadSample, read_again
from dalle_cli.errors import UserError

T = TypeVar("T")


class ParquetTable:
    """A `tables.Table` whose places are row numbers; captions are strings or lists of strings.

    Raises:
        UserError: the file cannot be read, or has no columns of pictures' paths and captions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = file_state(os.stat(path))
        self._texts: list[Any] | None = None
        try:
            schema = pq.read_schema(open_checked(path))
            columns = find_columns(schema.names)
            if columns is None:
                raise UserError(f"{path}: has {looked_for(schema.names)}")
            check_text(path, columns.image, schema.field(columns.image).type)
            for name in columns.captions:
                check_captions(path, name, schema.field(name).type)
            if columns.key is not None:
                check_text(path, columns.key, schema.field(columns.key).type, integers=True)
            self.key_column = columns.key
            self._caption_columns = list(columns.captions)
            self._images = PackedStrings(read_strings(path, columns.image))
            self._keys = None if columns.key is None else PackedStrings(read_strings(path, columns.key))
        except pa.ArrowException as error:
            raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]})") from None

    def rows(self) -> Iterator[Row | BadRow]:
        for place in range(len(self._images)):
            yield Row(place, f"row {place + 1}", self.image(place), self.key(place))

    def image(self, place: int) -> str:
        return self._images[place]

    def key(self, place: int) -> str:
        return "" if self._keys is None else self._keys[place]

    def captions(self, place: int) -> list[str | bytes]:
        if self._texts is None:
            self._texts = read_texts(self.path, self._state, self._caption_columns)
        return texts_of_row(self._texts, place)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": None}  # workers that read pictures do not need the captions


def read_parquet(path: Path, state: tuple[int, int], read: Callable[[], T]) -> T:
    """Return what ``read`` returns of the file of an opened source.

    Raises:
        BadSample, UserError: see ``read_again``; the file is damaged, or its ``file_state`` is no longer ``state``.
    """

    def checked() -> T:
        if file_state(os.stat(path)) != state:
            raise UserError(changed(path))
        try:
            return read()
        except pa.ArrowException as error:
            raise BadSample(f"{path} cannot be read: {str(error).splitlines()[0]}") from error

    return read_again(str(path), checked)


def read_texts(path: Path, state: tuple[int, int], columns: list[str]) -> list[Any]:
    """Return each caption column as a chunked array of bytes, since Arrow does not check that strings are UTF-8.

    Raises:
        BadSample, UserError: see ``read_parquet``.
    """
    table = read_parquet(path, state, lambda: pq.read_table(open_checked(path), columns=columns))
    return [
        column.cast(pa.large_list(pa.large_binary()) if _is_list(column.type) else pa.large_binary())
        for column in (table.column(name) for name in columns)
    ]


def texts_of_row(columns: list[Any], place: int) -> list[str | bytes]:
    """Return the captions of a row in columns of ``read_texts``, without those that are null."""
    values = [column[place].as_py() for column in columns]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [text for texts in lists for text in texts if text is not None]


def read_strings(path: Path, name: str) -> Iterator[str]:
    """Yield the stripped values of a column, such as "path" or "image.path", "" for null.

    Invalid UTF-8 is replaced, so such a path is never found.
    """
    with pq.ParquetFile(open_checked(path)) as file:
        for batch in file.iter_batches(columns=[name]):
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, name.partition(".")[2])
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if pa.types.is_integer(column.type):
                column = column.cast(pa.large_string())
            for value in column.cast(pa.large_binary()).to_pylist():
                yield "" if value is None else value.decode("utf-8", "replace").strip()


def check_captions(path: Path, name: str, kind: Any) -> None:
    """Raise UserError if a column is neither text nor lists of text."""
    check_text(path, name, kind.value_type if _is_list(kind) else kind)


def check_text(path: Path, name: str, kind: Any, *, integers: bool = False) -> None:
    """Raise UserError if a column is neither text nor, with ``integers``, integers."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or (integers and pa.types.is_integer(kind))):
        raise UserError(f"{path}: the column {name} holds {kind}, not text")


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
