"""Manifests that are text, CSV, TSV and JSON lines: only where each row begins is kept, and read again when needed."""

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

from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, is_unicode, split_extension
from dalle_cli.errors import UserError

IMAGE_COLUMNS = (
    *("path", "image_path", "img_path", "filepath", "file_path", "file", "file_name", "filename"),
    *("image_file", "image_name", "image", "img", "url", "image_url", "img_url"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "title", "comment")
KEY_COLUMNS = ("key", "id")

_NUMBERED = re.compile(r"caption_?[0-9]+")


@dataclass(frozen=True)
class Columns:
    """Names as the manifest spells them."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def find_columns(names: Iterable[str]) -> Columns | None:
    """The first known name of each kind, in any case; all of caption_0, caption_1, ... count. None without a picture
    or without a caption.
    """
    spelled = {name.strip().lower(): name for name in reversed(list(names))}
    image = next((spelled[name] for name in IMAGE_COLUMNS if name in spelled), None)
    caption = next(((spelled[name],) for name in CAPTION_COLUMNS if name in spelled), None)
    numbered = tuple(spelled[name] for name in sorted(spelled, key=_number) if _NUMBERED.fullmatch(name))
    captions = caption or numbered
    if image is None or not captions:
        return None
    return Columns(image, captions, next((spelled[name] for name in KEY_COLUMNS if name in spelled), None))


def looked_for(found: Iterable[str]) -> str:
    """What an error says when `find_columns` finds none."""
    there = ", ".join(name.strip()[:40] for name in list(found)[:12]) or "none"
    return (
        f"no columns of pictures and captions (its columns: {there}; "
        f"looked for {', '.join(IMAGE_COLUMNS)} and for {', '.join(CAPTION_COLUMNS)}, caption_0 ...)"
    )


def _number(name: str) -> tuple[int, str]:
    digits = re.sub("[^0-9]", "", name)
    return int(digits) if digits else 0, name


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_DELIMITERS = (",", "\t", ";", "|")
_MAX_LINE_BYTES = 16 << 20
_ROWS_LOOKED_AT = 100  # to tell the columns of JSON lines, and which column of a file without a header holds paths


class Row(NamedTuple):
    """A manifest's row; `image` and `key` are "" where it has none."""

    place: int
    where: str  # for people: "line 17"
    image: str
    key: str


class BadRow(NamedTuple):
    """A row that cannot be read, and why."""

    where: str
    reason: str


class Table(Protocol):
    """A list of pictures and captions; what a row holds is read anew, by the row's place."""

    path: Path
    key_column: str | None

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows in their order."""
        ...

    def image(self, place: int) -> str:
        """The picture's path as it is written, stripped."""
        ...

    def key(self, place: int) -> str:
        """What is in the key's column, stripped."""
        ...

    def captions(self, place: int) -> list[str | bytes]:
        """The row's captions as they are written, maybe none. May raise BadSample, as may `image` and `key`."""
        ...


class _TextTable:
    """What the text formats share: a row's place is the byte where it begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_column: str | None = None
        self._state = file_state(os.stat(path))

    def _open(self, place: int) -> BinaryIO:
        """The file at a row's place. BadSample if it cannot be read, or is no longer what it was."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise BadSample(f"{self.path} cannot be read: {error.strerror}") from error
        if file_state(os.fstat(file.fileno())) != self._state:
            file.close()
            raise BadSample(f"{self.path} has changed since it was indexed")
        file.seek(place)
        return file


def file_state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


class DelimitedTable(_TextTable):
    """Values between delimiters. `columns` are numbers; `image_end` cuts off what stands behind a picture's name."""

    def __init__(
        self,
        path: Path,
        delimiter: str,
        *,
        width: int,
        image: int,
        captions: tuple[int, ...],
        key: int | None = None,
        key_column: str | None = None,
        header: bool = True,
        quoted: bool = True,
        image_end: re.Pattern[str] | None = None,
    ) -> None:
        super().__init__(path)
        self.key_column = key_column
        self._delimiter, self._quoted, self._header = delimiter, quoted, header
        self._width, self._image, self._captions, self._key = width, image, captions, key
        self._image_end = image_end

    def rows(self) -> Iterator[Row | BadRow]:
        with self._open(0) as file:
            lines = _Lines(file)
            at = lines.at, lines.number
            while True:
                try:
                    for fields in self._records(lines):
                        place, number = at
                        at = lines.at, lines.number
                        if (self._header and number == 1) or not fields:
                            continue
                        where = f"line {number}"
                        if len(fields) != self._width:
                            yield BadRow(where, f"has {len(fields)} fields, not {self._width}")
                        else:
                            key = "" if self._key is None else fields[self._key].strip()
                            yield Row(place, where, self._name(fields), key)
                    return
                except csv.Error as error:
                    yield BadRow(f"line {at[1]}", f"is not well-formed ({error})")
                    # Nothing says where the record was meant to end: the next line begins the next one.
                    lines.go_behind(*at)
                    at = lines.at, lines.number

    def image(self, place: int) -> str:
        return self._name(self._fields(place))

    def key(self, place: int) -> str:
        return "" if self._key is None else self._fields(place)[self._key].strip()

    def captions(self, place: int) -> list[str | bytes]:
        fields = self._fields(place)
        texts = [fields[column] for column in self._captions]
        return [text if is_unicode(text) else text.encode("utf-8", "surrogateescape") for text in texts]

    def _name(self, fields: list[str]) -> str:
        name = fields[self._image].strip()
        return name if self._image_end is None else self._image_end.sub("", name)

    def _fields(self, place: int) -> list[str]:
        with self._open(place) as file:
            return next(self._records(_Lines(file)))

    def _records(self, lines: Iterator[str]) -> Iterator[list[str]]:
        if self._quoted:
            return csv.reader(lines, delimiter=self._delimiter, strict=True)
        return csv.reader(lines, delimiter=self._delimiter, quoting=csv.QUOTE_NONE, strict=True)


class _Lines:
    """A file's lines as csv.reader wants them, counted; a byte order mark is passed over."""

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

    def go_behind(self, at: int, number: int) -> None:
        """To the line after the one that begins at byte `at`."""
        self._file.seek(at)
        self.at, self.number = at, number
        next(self, None)


def open_delimited(path: Path) -> DelimitedTable:
    """A CSV or TSV file by its header, or a TSV of Conceptual Captions' layout, which has none.

    With a header, the delimiter is whichever of comma, tab, semicolon and bar makes its names known ones, and fields
    may be quoted as Python's csv and pandas write them. Without one, two fields a line, a caption and a path or URL in
    either order, between them a tab, and quotes are ordinary letters.

    Raises UserError if it is neither.
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
            at = fields.index
            return DelimitedTable(
                path,
                delimiter,
                width=len(fields),
                image=at(found.image),
                captions=tuple(map(at, found.captions)),
                key=None if found.key is None else at(found.key),
                key_column=found.key,
            )
    if (image := _path_column(path)) is not None:
        return DelimitedTable(path, "\t", width=2, image=image, captions=(1 - image,), header=False, quoted=False)
    raise UserError(f"{path}: line 1 names {looked_for(names)}")


def first_line(path: Path) -> str:
    """Without the byte order mark. UserError if the file is empty, or its beginning is not UTF-8."""
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
    """Which of the two columns of a TSV without a header holds paths or URLs; None if neither does, or both."""
    rows = []
    with path.open("rb") as file:
        for line in _Lines(file):
            rows.append(line.rstrip("\r\n").split("\t"))
            if len(rows) == _ROWS_LOOKED_AT:
                break
    rows = [row for row in rows if len(row) == 2]
    paths = [sum(_is_path(row[column].strip(), path.parent) for row in rows) for column in (0, 1)]
    return None if paths[0] == paths[1] else int(paths[1] > paths[0])


def _is_path(text: str, folder: Path) -> bool:
    if URL.match(text) or split_extension(text)[1] in IMAGE_EXTENSIONS:
        return True
    return bool(text) and "\0" not in text and len(text) < 256 and (folder / text).is_file()


class JsonLinesTable(_TextTable):
    """One JSON object a line; its fields are found as a header's are, in any of the first rows.

    Raises UserError if they name no picture and caption.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names: dict[str, None] = {}
        for i, (_, _, fields) in enumerate(self._objects()):
            names |= dict.fromkeys(fields if isinstance(fields, dict) else ())
            if i == _ROWS_LOOKED_AT:
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
        """(place, line's number, the object or what is wrong) of each line that is not empty."""
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
