"""Tables of pictures and captions: their interface, their column names, and CSV, TSV and JSON lines.

For a text file, only the offset of each row is kept in memory; a row is read again when it is needed.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, is_unicode, read_again, split_extension
from dalle_cli.errors import UserError

IMAGE_COLUMNS = (
    *("path", "image_path", "img_path", "filepath", "file_path", "file", "file_name", "filename"),
    *("image_file", "image_name", "image", "img", "url", "image_url", "img_url"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt", "title", "comment")
KEY_COLUMNS = ("key", "id")

_NUMBERED = re.compile(r"caption_?[0-9]+")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used, as the manifest spells them."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def find_columns(names: Iterable[str]) -> Columns | None:
    """Find the columns by the first known name of each kind, or all of caption_0, caption_1 ..., ignoring case.

    Return None if there is no column of pictures or none of captions.
    """
    names = list(names)
    image, captions = find_column(names, IMAGE_COLUMNS), find_caption_columns(names)
    return Columns(image, captions, find_column(names, KEY_COLUMNS)) if image is not None and captions else None


def find_column(names: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the column of the first known name, as the file spells it, ignoring case; None if there is none."""
    spelled = _spelled(names)
    return next((spelled[name] for name in known if name in spelled), None)


def find_caption_columns(names: Iterable[str]) -> tuple[str, ...]:
    """Return the column of the first known name of captions, or else all of caption_0, caption_1 ..., possibly none."""
    names = list(names)
    if (caption := find_column(names, CAPTION_COLUMNS)) is not None:
        return (caption,)
    spelled = _spelled(names)
    return tuple(spelled[name] for name in sorted(spelled, key=_number) if _NUMBERED.fullmatch(name))


def _spelled(names: Iterable[str]) -> dict[str, str]:
    """Return the first spelling of each name by its lower case."""
    return {name.strip().lower(): name for name in reversed(list(names))}


def looked_for(found: Iterable[str]) -> str:
    """Return the end of the error message for a manifest in which ``find_columns`` finds nothing."""
    names = ", ".join(name.strip()[:40] for name in list(found)[:12]) or "none"
    return (
        f"no columns of pictures and captions (its columns: {names}; "
        f"looked for {', '.join(IMAGE_COLUMNS)} and for {', '.join(CAPTION_COLUMNS)}, caption_0 ...)"
    )


def _number(name: str) -> tuple[int, str]:
    digits = re.sub("[^0-9]", "", name)
    return int(digits) if digits else 0, name


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_DELIMITERS = (",", "\t", ";", "|")
_MAX_LINE_BYTES = 16 << 20
_ROWS_INSPECTED = 100
"""Number of rows from which the columns of JSON lines, or the path column of a file without a header, are found."""


class Row(NamedTuple):
    """A manifest's row; ``image`` (the picture's path) and ``key`` are "" if missing."""

    place: int
    """Number by which the table finds the row again."""
    where: str
    """The row's name in messages, such as "line 17"."""
    image: str
    key: str


class BadRow(NamedTuple):
    """A row that cannot be read, and why."""

    where: str
    reason: str


class Table(Protocol):
    """A list of pictures and captions; ``image``, ``key`` and ``captions`` read a row again by its place.

    These three raise UserError if the file cannot be read any more or has changed.
    """

    path: Path
    key_column: str | None

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield all rows in order."""
        ...

    def image(self, place: int) -> str:
        """Return the picture's path as written, stripped."""
        ...

    def key(self, place: int) -> str:
        """Return the value of the key column, stripped."""
        ...

    def captions(self, place: int) -> list[str | bytes]:
        """Return the row's captions as written, possibly none."""
        ...


class _TextTable:
    """The base of the text formats, in which a row's place is the offset of its first byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_column: str | None = None
        self._state = file_state(os.stat(path))

    def _open(self, place: int) -> BinaryIO:
        """Open the file at a row's place; raise BadSample or UserError if it cannot be read or has changed."""
        file = read_again(str(self.path), lambda: self.path.open("rb"))
        if file_state(os.fstat(file.fileno())) != self._state:
            file.close()
            raise UserError(changed(self.path))
        file.seek(place)
        return file


def changed(path: Path) -> str:
    """Return the message about a file that has changed since its source was opened."""
    return f"{path}: has changed since it was indexed; run the command again"


def file_state(found: os.stat_result) -> tuple[int, int]:
    """Return size and time of modification, to detect that a file has changed."""
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class DelimitedLayout:
    """The layout of a delimited file of ``width`` columns, which are counted from 0."""

    delimiter: str
    width: int
    image: int
    captions: tuple[int, ...]
    key: int | None = None
    key_column: str | None = None
    """Name of the column ``key``."""
    header: bool = True
    quoted: bool = True
    """True if fields may be quoted, as Python's csv and pandas write them."""
    image_suffix: re.Pattern[str] | None = None
    """Pattern of text after a picture's name that is cut off."""


class DelimitedTable(_TextTable):
    """A `Table` of values between delimiters."""

    def __init__(self, path: Path, layout: DelimitedLayout) -> None:
        super().__init__(path)
        self.key_column = layout.key_column
        self._layout = layout

    def rows(self) -> Iterator[Row | BadRow]:
        with self._open(0) as file:
            lines = _Lines(file)
            at = lines.at, lines.number
            while True:
                try:
                    for fields in self._records(lines):
                        place, number = at
                        at = lines.at, lines.number
                        if (self._layout.header and number == 1) or not fields:
                            continue
                        where = f"line {number}"
                        if len(fields) != self._layout.width:
                            yield BadRow(where, f"has {len(fields)} fields, not {self._layout.width}")
                        else:
                            yield Row(place, where, self._image_name(fields), self._key(fields))
                    return
                except csv.Error as error:
                    yield BadRow(f"line {at[1]}", f"is not well-formed ({error})")
                    # The record's end is unknown, so the next line is taken to begin the next record.
                    lines.seek_after(*at)
                    at = lines.at, lines.number

    def image(self, place: int) -> str:
        return self._image_name(self._fields(place))

    def key(self, place: int) -> str:
        return self._key(self._fields(place))

    def captions(self, place: int) -> list[str | bytes]:
        fields = self._fields(place)
        texts = [fields[column] for column in self._layout.captions]
        return [text if is_unicode(text) else text.encode("utf-8", "surrogateescape") for text in texts]

    def _image_name(self, fields: list[str]) -> str:
        name = fields[self._layout.image].strip()
        return name if self._layout.image_suffix is None else self._layout.image_suffix.sub("", name)

    def _key(self, fields: list[str]) -> str:
        return "" if self._layout.key is None else fields[self._layout.key].strip()

    def _fields(self, place: int) -> list[str]:
        with self._open(place) as file:
            return next(self._records(_Lines(file)))

    def _records(self, lines: Iterator[str]) -> Iterator[list[str]]:
        if self._layout.quoted:
            return csv.reader(lines, delimiter=self._layout.delimiter, strict=True)
        return csv.reader(lines, delimiter=self._layout.delimiter, quoting=csv.QUOTE_NONE, strict=True)


class _Lines:
    """An iterator of a file's lines for csv.reader, which counts them and skips a byte order mark."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.at, self.number = file.tell(), 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if self.at == 0:
            line, mark = line.removeprefix(codecs.BOM_UTF8), line
            self.at += len(mark) - len(line)
        self.at += len(line)
        self.number += 1
        try:
            return line.decode()
        except UnicodeDecodeError:
            return line.decode("utf-8", "surrogateescape")

    def seek_after(self, at: int, number: int) -> None:
        """Continue after the line that begins at byte ``at``."""
        self._file.seek(at)
        self.at, self.number = at, number
        next(self, None)


def open_delimited(path: Path) -> DelimitedTable:
    """Open a CSV or TSV file with a header, or a TSV in Conceptual Captions' layout, which has none.

    With a header, the delimiter is the one of comma, tab, semicolon and bar that yields column names known to
    ``find_columns``, and fields may be quoted. Without a header, a line has a caption and a path or URL in either order
    with a tab between them, and quotes are ordinary characters.

    Raises:
        UserError: the file has neither layout.
    """
    names: list[str] = []
    first = first_line(path)
    for delimiter in _DELIMITERS:
        try:
            fields = next(csv.reader([first], delimiter=delimiter))
        except csv.Error as error:
            raise UserError(f"{path}: line 1 is not well-formed ({error})") from None
        names = fields if len(fields) > len(names) else names
        if (found := find_columns(fields)) is not None:
            column = fields.index
            layout = DelimitedLayout(
                delimiter,
                width=len(fields),
                image=column(found.image),
                captions=tuple(map(column, found.captions)),
                key=None if found.key is None else column(found.key),
                key_column=found.key,
            )
            return DelimitedTable(path, layout)
    if (image := _path_column(path)) is not None:
        layout = DelimitedLayout("\t", width=2, image=image, captions=(1 - image,), header=False, quoted=False)
        return DelimitedTable(path, layout)
    raise UserError(f"{path}: line 1 names {looked_for(names)}")


def first_line(path: Path) -> str:
    """Return a file's first line, without the byte order mark.

    Raises:
        UserError: the line is empty or not UTF-8.
    """
    with path.open("rb") as file:
        line = file.readline(1 << 16).removeprefix(codecs.BOM_UTF8)
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: its first line is empty; a manifest begins with the names of its columns")
    return text


def _path_column(path: Path) -> int | None:
    """Return which of the two columns of a TSV without a header holds paths or URLs; None if neither or both do."""
    rows = []
    with path.open("rb") as file:
        for line in _Lines(file):
            rows.append(line.rstrip("\r\n").split("\t"))
            if len(rows) == _ROWS_INSPECTED:
                break
    rows = [row for row in rows if len(row) == 2]
    paths = [sum(_is_path(row[column].strip(), path.parent) for row in rows) for column in (0, 1)]
    return None if paths[0] == paths[1] else int(paths[1] > paths[0])


def _is_path(text: str, folder: Path) -> bool:
    if URL.match(text) or split_extension(text)[1] in IMAGE_EXTENSIONS:
        return True
    return bool(text) and "\0" not in text and len(text) < 256 and (folder / text).is_file()


class JsonLinesTable(_TextTable):
    """A `Table` of one JSON object a line, whose columns are the fields of the first objects.

    Raises:
        UserError: no field has a known name for pictures, or none has one for captions.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names: dict[str, None] = {}
        for i, (_, _, fields) in enumerate(self._objects()):
            names |= dict.fromkeys(fields if isinstance(fields, dict) else ())
            if i == _ROWS_INSPECTED:
                break
        columns = find_columns(names)
        if columns is None:
            raise UserError(f"{path}: the first lines have {looked_for(names)}")
        self._columns: Columns = columns
        self.key_column = columns.key

    def rows(self) -> Iterator[Row | BadRow]:
        for place, number, fields in self._objects():
            where = f"line {number}"
            if isinstance(fields, dict):
                yield Row(place, where, self._text(fields, self._columns.image), self._text(fields, self.key_column))
            else:
                yield BadRow(where, fields)

    def image(self, place: int) -> str:
        return self._text(self._fields(place), self._columns.image)

    def key(self, place: int) -> str:
        return self._text(self._fields(place), self.key_column)

    def captions(self, place: int) -> list[str | bytes]:
        fields = self._fields(place)
        values = [fields.get(name) for name in self._columns.captions]
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [text for texts in lists for text in texts if isinstance(text, str)]

    def _objects(self) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """Yield (place, line number, the object or an error message) for each line that is not empty."""
        with self._open(0) as file:
            place = number = 0
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                if line.strip():
                    yield place, number, _json_object(line)
                place += len(line)

    def _fields(self, place: int) -> dict[str, Any]:
        with self._open(place) as file:
            fields = _json_object(file.readline(_MAX_LINE_BYTES))
        if isinstance(fields, str):
            raise BadSample(fields)
        return fields

    def _text(self, fields: dict[str, Any], name: str | None) -> str:
        value = fields.get(name) if name is not None else None
        if isinstance(value, bool) or not isinstance(value, str | int):
            return ""
        return str(value).strip()


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError):
        return "is not valid JSON"
    return fields if isinstance(fields, dict) else "is not a JSON object"
