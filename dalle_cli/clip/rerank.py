"""Reranking: of each caption's samples, the pictures that CLIP finds closest to it (paper, section 2.6)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.clip.scoring import Scorer, similarities
from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.samples import is_unicode
from dalle_cli.errors import UserError

Line = dict[str, Any]


def read_manifest(lines: Iterable[str], name: str) -> Iterator[Line]:
    """The JSON lines of ``dalle sample``, as they come in.

    Raises:
        UserError: a line is no JSON object with ``prompt`` and ``png``, named by its number.
    """
    for number, text in enumerate(_texts(lines, name), start=1):
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
        yield line


def _texts(lines: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not text ({error.reason}); give the lines of dalle sample") from None


def rerank(lines: Iterable[Line], scorer: Scorer, top: int | None, batch: int = 64) -> Iterator[Line]:
    """The lines with ``score`` (cosine similarity), ``rank`` (from 1) and ``scorer``, best first within each prompt.

    Pictures are scored while lines come in, ``batch`` at a time; a prompt's lines leave when the next prompt begins,
    so a stream of many prompts is never held whole. ``top`` keeps the best of each prompt.

    Raises:
        UserError: a picture is missing or cannot be read.
    """
    for prompt, group in _by_prompt(lines):
        scored: list[Line] = []
        for chunk in _chunks(group, batch):
            scores = similarities(scorer, prompt, [_read_png(line) for line in chunk])
            scored += [{**line, "score": float(score)} for line, score in zip(chunk, scores, strict=True)]
        # Ties keep the order of the samples, so that the result does not depend on the sort.
        scored.sort(key=lambda line: -line["score"])
        for rank, line in enumerate(scored[:top], start=1):
            yield {**line, "score": round(line["score"], 6), "rank": rank, "scorer": scorer.name}


def _by_prompt(lines: Iterable[Line]) -> Iterator[tuple[str, Iterator[Line]]]:
    from itertools import groupby

    yield from groupby(lines, key=lambda line: line["prompt"])


def _chunks(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _read_png(line: Line) -> np.ndarray:
    path = Path(line["png"])
    try:
        return np.asarray(decode_image(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: the sample's picture is missing; draw it again with dalle sample") from None
    except (OSError, BadImage) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
