"""Samples as JSON lines, which ``dalle sample`` and ``dalle rerank`` print and other commands read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from dalle_cli.data.source import is_unicode
from dalle_cli.errors import UserError

SampleLine = dict[str, Any]
"""A sample: always ``prompt`` and ``png``, and the other keys of ``stores.samples.ManifestLines``.

``run`` is there if its folder lies outside its prior's run, and ``score``, ``rank`` and ``scorer`` once it is ranked.
Any other keys, which ``jq`` may add, are passed on."""
PATHS = ("png", "store", "run")
"""Keys whose values, if there are any, are paths."""


def read_sample_lines(lines: Iterable[str], name: str) -> Iterator[SampleLine]:
    """Yield the samples of JSON lines as they come in; ``name`` is the file's name in error messages.

    Raises:
        UserError: a line is no JSON object with ``prompt`` and ``png``, or one of PATHS is no path.
    """
    for number, text in enumerate(_decoded(lines, name), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: not JSON ({error}); give the lines of dalle sample") from None
        if (
            not isinstance(line, dict)
            or not isinstance(line.get("prompt"), str)
            or not isinstance(line.get("png"), str)
        ):
            raise UserError(f"{name}, line {number}: has no 'prompt' and 'png'; give the lines of dalle sample")
        if not is_unicode(line["prompt"]):
            raise UserError(f"{name}, line {number}: its prompt is not valid Unicode; give the lines of dalle sample")
        if wrong := [key for key in PATHS if line.get(key) is not None and not _is_path(line[key])]:
            raise UserError(f"{name}, line {number}: its {wrong[0]!r} is no path; give the lines of dalle sample")
        yield line


def _is_path(value: object) -> bool:
    """Return whether a file can have this name."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _decoded(lines: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not text ({error.reason}); give the lines of dalle sample") from None
