"""Captions to draw, from the files that captions come in: text, JSON lines, COCO's captions, standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_cli.errors import UserError

CAPTION_KEYS = ("prompt", "caption")
ID_KEYS = ("id", "key", "image_id", "caption_id")
"""What a file calls its captions and pictures by: goes into the manifest as it is."""


@dataclass(frozen=True)
class Prompt:
    """A caption to draw, its ids in the file it comes from, and the picture whose first rows are given, if any."""

    text: str
    ids: dict[str, str | int] = field(default_factory=dict)
    prime: Path | None = None


def read_prompts(file: Path) -> list[Prompt]:
    """The captions of ``file``, told by its ending: .jsonl or .ndjson, .json of COCO's captions, else one a line.

    ``-`` is standard input: JSON lines if it begins with ``{``, else captions, one a line. A JSON line has its caption
    under ``prompt`` or ``caption``, may have any of ``id``, ``key``, ``image_id`` and ``caption_id``, and as ``prime``
    the path of a picture.

    Raises:
        UserError: it cannot be read, or a line or entry of it has no caption, named by its number.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a file of captions ({error})") from None
    name = "stdin" if str(file) == "-" else str(file)
    ending = file.suffix.lower()
    if ending in (".jsonl", ".ndjson") or (str(file) == "-" and text.lstrip().startswith("{")):
        return _json_lines(text, name)
    if ending == ".json":
        return _coco(text, name)
    return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]


def _json_lines(text: str, name: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: not JSON ({error}); give one object a line") from None
        caption = next((row[key] for key in CAPTION_KEYS if key in row), None) if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise UserError(f"{name}, line {number}: has no text under 'prompt' or 'caption'")
        prime = row.get("prime")
        if prime is not None and not isinstance(prime, str):
            raise UserError(f"{name}, line {number}: its 'prime' is no path of a picture")
        prompts.append(Prompt(caption.strip(), _ids(row), None if prime is None else Path(prime)))
    return prompts


def _coco(text: str, name: str) -> list[Prompt]:
    """The annotations of COCO's captions_*.json, in its order; the pictures are not asked for."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not valid JSON ({error}); JSON lines have to end in .jsonl") from None
    annotations = whole.get("annotations") if isinstance(whole, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{name}: is not COCO's captions (no list 'annotations'); JSON lines have to end in .jsonl")
    prompts = []
    for number, annotation in enumerate(annotations, start=1):
        caption = annotation.get("caption") if isinstance(annotation, dict) else None
        if not isinstance(caption, str):
            raise UserError(f"{name}: its annotation {number} has no caption; name the captions_*.json")
        prompts.append(Prompt(caption.strip(), _ids(annotation)))
    return prompts


def _ids(row: dict[str, Any]) -> dict[str, str | int]:
    return {key: row[key] for key in ID_KEYS if isinstance(row.get(key), str | int)}
