"""The captions that a study asks about, each with an id by which systems name their pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle_cli.data.source import BadSample, clean_caption
from dalle_cli.errors import UserError


def read_captions(path: Path) -> dict[str, str]:
    """Captions by id, in the file's order.

    A text file has one a line, its id the line's number from 1. A .jsonl file has objects with ``caption`` and, if
    ids are not to be line numbers, ``id``. A .json file is COCO's captions, its ids those of the annotations.

    Raises:
        UserError: the file cannot be read, holds no caption, or holds an id twice.
    """
    captions: dict[str, str] = {}
    for where, identity, text in _entries(path):
        try:
            caption = clean_caption(text)
        except BadSample as error:
            raise UserError(f"{path}, {where}: {error}") from None
        if identity in captions:
            raise UserError(f"{path}, {where}: the id {identity} comes twice; give each caption one of its own")
        captions[identity] = caption
    if not captions:
        raise UserError(f"{path}: holds no caption; write one a line")
    return captions


def normal_id(identity: str) -> str:
    """``0042`` and ``42`` are one id: tools pad the numbers that they name files by."""
    return str(int(identity)) if identity.isascii() and identity.isdigit() else identity


def _entries(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where it stands, id and text of each caption."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a file of captions ({error})") from None
    if path.suffix == ".json":
        yield from _coco(path, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"line {number}"
            yield where, *(_json_line(path, where, line, number) if path.suffix == ".jsonl" else (str(number), line))


def _json_line(path: Path, where: str, line: str, number: int) -> tuple[str, str]:
    entry = _json(path, where, line)
    if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
        raise UserError(f'{path}, {where}: has no "caption"; write {{"id": ..., "caption": "..."}} in each line')
    return _identity(path, where, entry.get("id", number)), entry["caption"]


def _coco(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    whole = _json(path, "the whole", text)
    annotations = whole.get("annotations") if isinstance(whole, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{path}: is not COCO's captions (no list of annotations); lines of JSON have to end in .jsonl")
    for number, entry in enumerate(annotations):
        where = f"annotation {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise UserError(f"{path}, {where}: has no caption")
        yield where, _identity(path, where, entry.get("id")), entry["caption"]


def _identity(path: Path, where: str, identity: object) -> str:
    if isinstance(identity, bool) or not isinstance(identity, int | str) or not str(identity).strip():
        raise UserError(f"{path}, {where}: its id is no number or word")
    return normal_id(str(identity).strip())


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, {where}: is not JSON ({error})") from None
