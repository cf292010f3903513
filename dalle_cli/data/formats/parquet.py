"""Parquet manifests: paths are kept in memory, and captions are read when the first one is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_cli.data.formats.tables import BadRow, Row, file_state, find_columns, looked_for
from dalle_cli.data.index import PackedStrings
from dalle_cli.data.source import BadSample
from dalle_cli.errors import UserError


class ParquetTable:
    """A `tables.Table` whose places are row numbers; captions are strings or lists of strings.

    Raises:
        UserError: the file cannot be read, has no columns of pictures and captions, or holds the pictures themselves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = file_state(os.stat(path))
        self._texts: list[Any] | None = None
        try:
            schema = pq.read_schema(path)
            columns = find_columns(schema.names)
            if columns is None:
                raise UserError(f"{path}: has {looked_for(schema.names)}")
            _check_type(path, columns.image, schema.field(columns.image).type, integers=False)
            for name in columns.captions:
                kind = schema.field(name).type
                _check_type(path, name, kind.value_type if _is_list(kind) else kind, integers=False)
            if columns.key is not None:
                _check_type(path, columns.key, schema.field(columns.key).type, integers=True)
            self.key_column = columns.key
            self._caption_columns = list(columns.captions)
            self._images = PackedStrings(_strings(path, columns.image))
            self._keys = None if columns.key is None else PackedStrings(_strings(path, columns.key))
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
            self._texts = self._read_captions()
        values = [column[place].as_py() for column in self._texts]
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [text for texts in lists for text in texts if text is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": None}  # workers that read pictures do not need the captions

    def _read_captions(self) -> list[Any]:
        """Return each caption column as a chunked array of bytes, since Arrow does not check that strings are UTF-8."""
        try:
            if file_state(os.stat(self.path)) != self._state:
                raise BadSample(f"{self.path} has changed since it was indexed")
            table = pq.read_table(self.path, columns=self._caption_columns)
            columns = [table.column(name) for name in self._caption_columns]
            return [
                column.cast(pa.large_list(pa.large_binary()) if _is_list(column.type) else pa.large_binary())
                for column in columns
            ]
        except (pa.ArrowException, OSError) as error:
            raise BadSample(f"{self.path} cannot be read: {str(error).splitlines()[0]}") from error


def _strings(path: Path, name: str) -> Iterator[str]:
    """Yield the stripped values of a column, "" for null; invalid UTF-8 is replaced, so such a path is never found."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[name]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if pa.types.is_integer(column.type):
                column = column.cast(pa.large_string())
            for value in column.cast(pa.large_binary()).to_pylist():
                yield "" if value is None else value.decode("utf-8", "replace").strip()


def _check_type(path: Path, name: str, kind: Any, *, integers: bool) -> None:
    """Raise UserError if a column is neither text nor, with ``integers``, integers."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(
            f"{path}: the column {name} holds the pictures themselves, not their paths: "
            "write them to files or WebDataset shards first"
        )
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or (integers and pa.types.is_integer(kind))):
        raise UserError(f"{path}: the column {name} holds {kind}, not text")


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
