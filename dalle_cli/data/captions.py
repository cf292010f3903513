"""Captions read from a text file, JSON lines, COCO's captions, standard input or a source of pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_cli.config.schema import Filters
from dalle_cli.data.filters import filter_captions
from dalle_cli.data.open_source import open_source
from dalle_cli.data.read_ahead import rows_ahead
from dalle_cli.data.source import BadSample, Source, clean_caption
from dalle_cli.errors import UserError
from dalle_cli.stores.files import split_lines

STDIN = Path("-")
CAPTION_KEYS = ("prompt", "caption")
MOST_CAPTIONS = 100
"""Number of a picture's captions that are used; a file of thousands of lines is no list of captions."""
ID_KEYS = ("id", "key", "image_id", "caption_id")
"""Keys of a captions file that are copied to the sample lines."""


@dataclass(frozen=True)
class Caption:
    """A caption to sample, its ids in its file, and the picture, if any, whose first rows the samples complete."""

    text: str
    ids: dict[str, str | int] = field(default_factory=dict)
    prime: Path | None = None


@dataclass(frozen=True)
class _Entry:
    """A caption in a file: ``place`` names its line or annotation in errors, ``row`` holds its fields."""

    file: str
    place: str
    line: int | None
    text: str
    row: dict[str, Any]

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.file}, {self.place}: {reason}")


def read_captions(file: Path) -> list[Caption]:
    """Read the captions of a file, whose ending names its format.

    A ``.jsonl`` or ``.ndjson`` file holds a JSON object a line, with the caption as ``prompt`` or ``caption``, and
    optionally ``id``, ``key``, ``image_id``, ``caption_id`` and, as ``prime``, a picture's path. A ``.json`` file holds
    COCO's captions. Any other file holds one caption a line. ``-`` is standard input: JSON lines if it begins with
    ``{``, else text.

    Raises:
        UserError: the file cannot be read, or one of its entries is no caption.
    """
    return [
        Caption(entry.text, {key: entry.row[key] for key in ID_KEYS if _is_id(entry.row.get(key))}, _prime(entry))
        for entry in _entries(file)
    ]


def read_captions_by_id(file: Path) -> dict[str, str]:
    """Read captions as ``read_captions`` does, by ``id``, in the file's order.

    The id of a line without one is its line number, from 1. COCO's annotations must have an id.

    Raises:
        UserError: see ``read_captions``; or the file holds no caption, or an id is missing, unusable or repeated.
    """
    captions: dict[str, str] = {}
    for entry in _entries(file):
        given = entry.row.get("id", entry.line)
        if not _is_id(given) or isinstance(given, bool) or not str(given).strip():
            raise entry.error("its id is not a number or a word")
        identity = normal_id(str(given).strip())
        if identity in captions:
            raise entry.error(f"the id {identity} is used twice; give each caption its own id")
        captions[identity] = entry.text
    if not captions:
        raise UserError(f"{file}: holds no caption; write one a line")
    return captions


def normal_id(identity: str) -> str:
    """Return the id without leading zeros, which some tools add to numbers in file names."""
    return (identity.lstrip("0") or "0") if identity.isascii() and identity.isdigit() else identity


def source_captions(source: Source, filters: Filters | None = None) -> Iterator[str]:
    """Yield the captions of a source that can be read and pass the recipe's caption filters, in order."""
    for row in rows_ahead(source, range(len(source)), "captions"):
        yield from filtered_captions(source, row, filters)[0][:MOST_CAPTIONS]


def first_captions(spec: str, filters: Filters, limit: int) -> list[str]:
    """Return the first ``limit`` different captions of the source ``spec`` that pass the filters.

    Raises:
        UserError: there is no source at ``spec``.
    """
    found: dict[str, None] = {}
    for caption in source_captions(open_source(spec), filters):
        found[caption] = None
        if len(found) == limit:
            break
    return list(found)


def filtered_captions(source: Source, row: int, filters: Filters | None) -> tuple[list[str], str | None]:
    """Return a row's captions that pass the filters, or none and the reason; without filters, all captions."""
    try:
        captions = source.captions(row)
    except BadSample as error:
        return [], str(error)
    return (captions, None) if filters is None else filter_captions(captions, filters)


def _entries(file: Path) -> Iterator[_Entry]:
    name = "stdin" if file == STDIN else str(file)
    if file == STDIN and sys.stdin is None:
        raise UserError("stdin: is closed; name a file of captions")
    if file.is_dir():
        raise UserError(f"{name}: is a folder, and no file of captions; name a file with one caption a line")
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as a file of captions ({error})") from None
    ending = file.suffix.lower()
    if ending in (".jsonl", ".ndjson") or (file == STDIN and text.lstrip().startswith("{")):
        rows = _json_lines(name, text)
    elif ending == ".json":
        rows = _coco(name, text)
    else:
        lines = enumerate(split_lines(text), start=1)
        rows = ((number, {"caption": line}) for number, line in lines if line.strip())
    what = "annotation" if ending == ".json" else "line"
    for number, row in rows:
        place = f"{what} {number}"
        caption = next((row[key] for key in CAPTION_KEYS if key in row), None) if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise UserError(f"{name}, {place}: has no text under 'prompt' or 'caption'")
        try:
            yield _Entry(name, place, number if what == "line" else None, clean_caption(caption), row)
        except BadSample as error:
            raise UserError(f"{name}, {place}: {error}; write what the picture shows") from None


def _json_lines(name: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}, line {number}: not JSON ({error}); give one object a line") from None
            yield number, row


def _coco(name: str, text: str) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not valid JSON ({error}); JSON lines have to end in .jsonl") from None
    annotations = whole.get("annotations") if isinstance(whole, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{name}: is not COCO's captions (no list 'annotations'); JSON lines have to end in .jsonl")
    yield from enumerate(annotations, start=1)


def _prime(entry: _Entry) -> Path | None:
    prime = entry.row.get("prime")
    if prime is not None and not isinstance(prime, str):
        raise entry.error("its 'prime' is not the path of a picture")
    return None if prime is None else Path(prime)


def _is_id(value: object) -> bool:
    return isinstance(value, str | int)
