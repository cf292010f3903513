"""Tables of web pictures as they are published, without the pictures: YFCC100M's and WIT's.

A picture is looked for where downloaders put it. A row whose picture is not there counts as skipped when it is read.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus, urlsplit

from dalle_cli.data.formats.manifest import ManifestSource
from dalle_cli.data.formats.tables import URL, BadRow, DelimitedLayout, DelimitedTable, Row, first_line
from dalle_cli.errors import UserError

YFCC_FILES = ("yfcc100m_dataset", "yfcc100m_dataset.tsv")
WIT_FILES = "wit_v1.*.tsv"
FOLDERS = ("images", "data/images", "")
"""Folders that may hold the pictures, relative to the table's."""
_PROBED = 2000
"""Number of pictures that are looked for to find their folder."""
_TAG = re.compile(r"<[^<>]+>")


class _YfccColumns(NamedTuple):
    """Columns of YFCC100M's metadata, counted from 0; the older edition has no hash of a picture."""

    identifier: int
    hash: int | None
    title: int
    description: int
    download: int
    extension: int
    marker: int


_YFCC = {25: _YfccColumns(1, 2, 8, 9, 16, 23, 24), 23: _YfccColumns(0, None, 6, 7, 14, 21, 22)}
"""The columns of each edition, by how many it has."""
_VIDEO = "a video"
"""Name in place of a picture's path in the row of a video."""
_WIT_IMAGE = "image_url"
_WIT_CAPTIONS = ("caption_reference_description", "caption_attribution_description", "caption_alt_text_description")


class WebTable(DelimitedTable):
    """A `tables.Table` whose rows name their pictures by something else than a path; ``path_of`` makes the path."""

    def __init__(self, path: Path, layout: DelimitedLayout, clean: Callable[[str], str] = str.strip) -> None:
        super().__init__(path, layout)
        self.path_of: Callable[[list[str]], str] = _no_path
        self._clean = clean

    def captions(self, place: int) -> list[str | bytes]:
        texts = super().captions(place)
        return [self._clean(text) if isinstance(text, str) else text for text in texts]

    def records(self) -> Iterator[list[str]]:
        """Yield the fields of each row that can be read."""
        return (self._fields(row.place) for row in super().rows() if isinstance(row, Row))

    def _image_name(self, fields: list[str]) -> str:
        return self.path_of(fields)


class YfccTable(WebTable):
    """YFCC100M's metadata: a title and a description a photo, as the web encodes them. Videos are left out."""

    def __init__(self, path: Path, width: int) -> None:
        self.columns = columns = _YFCC[width]
        captions = (columns.title, columns.description)
        layout = DelimitedLayout("\t", width, columns.download, captions, header=False, quoted=False)
        super().__init__(path, layout, _plain_text)

    def rows(self) -> Iterator[Row | BadRow]:
        for row in super().rows():
            video = isinstance(row, Row) and row.image == _VIDEO
            yield BadRow(row.where, "is a video") if video else row

    def _image_name(self, fields: list[str]) -> str:
        return _VIDEO if fields[self.columns.marker].strip() == "1" else super()._image_name(fields)


def open_yfcc(name: str, path: Path) -> ManifestSource | None:
    """Open YFCC100M's metadata, or a folder with it; None if it is something else.

    Raises:
        UserError: none of its first pictures is on the disk.
    """
    file = next((found for each in YFCC_FILES if (found := path / each).is_file()), None) if path.is_dir() else path
    if file is None or not file.is_file() or file.suffix.lower() not in ("", ".tsv"):
        return None
    fields = _first_line(file).split("\t")
    columns = _YFCC.get(len(fields))
    if columns is None or not URL.match(fields[columns.download]) or fields[columns.marker].strip() not in ("0", "1"):
        return None
    table = YfccTable(file, len(fields))
    ways = [partial(_by_identifier, columns.identifier, columns.extension), partial(_last_of_url, columns.download)]
    _find_pictures(table, ways if columns.hash is None else [partial(_by_hash, columns.hash), *ways])
    return ManifestSource(name, "yfcc100m", table, file.parent, probe=False)


def open_wit(name: str, path: Path) -> ManifestSource | None:
    """Open a table of WIT, or a folder with one; None if it is something else.

    All rows of a picture, in whatever language, contribute captions.

    Raises:
        UserError: there are several tables, or none of the first pictures is on the disk.
    """
    found = sorted(path.glob(WIT_FILES)) if path.is_dir() else [path]
    if len(found) > 1:
        raise UserError(f"{name}: holds {len(found)} tables of WIT: name one of {', '.join(map(str, found))}")
    if not found or not found[0].is_file() or found[0].suffix.lower() != ".tsv":
        return None
    header = _first_line(found[0]).split("\t")
    if not {_WIT_IMAGE, *_WIT_CAPTIONS} <= set(header):
        return None
    url, captions = header.index(_WIT_IMAGE), tuple(map(header.index, _WIT_CAPTIONS))
    table = WebTable(found[0], DelimitedLayout("\t", len(header), url, captions))
    _find_pictures(table, [partial(_decoded_last_of_url, url), partial(_last_of_url, url)])
    return ManifestSource(name, "wit", table, found[0].parent, probe=False)


def _find_pictures(table: WebTable, ways: Sequence[Callable[[list[str]], str]]) -> None:
    """Set ``path_of`` to the first way and folder by which one of the first pictures is found."""
    records = list(islice(table.records(), _PROBED))
    root = table.path.parent
    for folder in FOLDERS:
        for way in ways:
            # Not Path's is_file, which raises an error on a name that is too long.
            if any(os.path.isfile(root / _path_in(folder, way, fields)) for fields in records):
                table.path_of = partial(_path_in, folder, way)
                return
    looked = f" (looked for {root / FOLDERS[0] / ways[0](records[0])} ...)" if records else ""
    raise UserError(
        f"{table.path}: none of its first pictures is on the disk{looked}; download them into "
        f"{root / FOLDERS[0]}, or let img2dataset make shards of them, which can be read here"
    )


def _no_path(fields: list[str]) -> str:
    return ""


def _path_in(folder: str, way: Callable[[list[str]], str], fields: list[str]) -> str:
    name = way(fields)
    return f"{folder}/{name}" if folder and name else name


def _by_hash(column: int, fields: list[str]) -> str:
    digest = fields[column].strip()
    return f"{digest[:3]}/{digest[3:6]}/{digest}.jpg" if digest.isalnum() else ""


def _by_identifier(column: int, extension_column: int, fields: list[str]) -> str:
    identifier, extension = fields[column].strip(), fields[extension_column].strip()
    return f"{identifier}.{extension}" if identifier.isdigit() and extension.isalnum() else ""


def _last_of_url(column: int, fields: list[str]) -> str:
    try:
        return urlsplit(fields[column].strip()).path.rpartition("/")[2]
    except ValueError:  # such as an address with half a bracket
        return ""


def _decoded_last_of_url(column: int, fields: list[str]) -> str:
    return unquote(_last_of_url(column, fields)).replace("/", "_")


def _plain_text(text: str) -> str:
    """Return a title or description of YFCC100M without the encoding of addresses, tags and entities of HTML."""
    return " ".join(html.unescape(_TAG.sub(" ", unquote_plus(text))).split())


def _first_line(file: Path) -> str:
    """Return the first line of a file that may be of another kind; "" if it is not text."""
    try:
        return first_line(file)
    except UserError:
        return ""
