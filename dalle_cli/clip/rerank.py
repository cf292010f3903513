"""Reranking: of each caption's samples, the pictures that CLIP finds closest to it (paper, section 2.6).

Lines are scored while they come in. Files are read and pictures decoded and prepared by threads while the model works
on the batch before, and batches run across captions, so that the model is what takes the time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
from torch import Tensor

from dalle_cli.clip.scoring import Scorer
from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.samples import is_unicode
from dalle_cli.errors import UserError
from dalle_cli.progress import log

Line = dict[str, Any]
BATCH = 64
BATCHES_AHEAD = 3
"""How far reading and decoding run ahead of the model."""
DECODERS = 4
"""Threads; decoding and preparing a picture take a small part of what a CLIP takes."""


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


def rerank(lines: Iterable[Line], scorer: Scorer, *, batch: int = BATCH, gather: bool = False) -> Iterator[list[Line]]:
    """Each prompt's lines with ``score`` (cosine similarity), ``rank`` (from 1) and ``scorer``, best first.

    A prompt's lines leave when the next prompt begins and their batch is scored, so that a stream of many prompts is
    never held whole. With ``gather`` all lines are held, and a prompt's lines need not stand together.

    Raises:
        UserError: a picture is missing or cannot be read, or is of another size than the others of its store.
    """
    pools: dict[str, list[Line]] = {}
    gone: set[str] = set()
    told = False
    for line in score(lines, scorer, batch):
        prompt = line["prompt"]
        if prompt not in pools and not gather:
            for earlier, pool in pools.items():
                gone.add(earlier)
                yield _ranked(pool, scorer)
            pools.clear()
            if prompt in gone and not told:
                told = True
                log(
                    f"rerank: the samples of {prompt!r} do not stand together and are ranked apart; name their files "
                    "as arguments, and they are ranked together"
                )
        pools.setdefault(prompt, []).append(line)
    for pool in pools.values():
        yield _ranked(pool, scorer)


def best_of_all(pools: Iterable[list[Line]], top: int | None) -> list[Line]:
    """The best lines of all prompts together, ranked anew."""
    lines = sorted((line for pool in pools for line in pool), key=lambda line: -line["score"])
    return [{**line, "rank": rank} for rank, line in enumerate(lines[:top], start=1)]


def score(lines: Iterable[Line], scorer: Scorer, batch: int = BATCH) -> Iterator[Line]:
    """The lines with an unrounded ``score``, in their order.

    Batches are every ``batch`` lines, whenever these come in, so that the same lines have the same scores. Captions'
    features are kept.

    Raises:
        UserError: see :func:`rerank`.
    """
    texts: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    ready = _prepared(lines, scorer, batch)
    while chunk := list(islice(ready, batch)):
        # In the order of lines, so that it is the first bad picture that is named.
        pictures = [future.result() for _, future in chunk]
        for (line, _), (_, size) in zip(chunk, pictures, strict=True):
            _check_size(line, size, sizes)
        new = list(dict.fromkeys(line["prompt"] for line, _ in chunk if line["prompt"] not in texts))
        if new:
            texts |= dict(zip(new, scorer.text_features(new), strict=True))
        features = scorer.prepared_features([prepared for prepared, _ in pictures])
        for (line, _), feature in zip(chunk, features, strict=True):
            yield {**line, "score": float(feature @ texts[line["prompt"]])}


Prepared = tuple[Tensor, tuple[int, ...]]
_Item = tuple[Line, Future[Prepared]] | BaseException | None


def _prepared(lines: Iterable[Line], scorer: Scorer, batch: int) -> Iterator[tuple[Line, Future[Prepared]]]:
    """Lines with their pictures, which threads prepare; a thread reads ahead, as far as BATCHES_AHEAD."""
    queue: Queue[_Item] = Queue(BATCHES_AHEAD * batch)
    stopped = threading.Event()

    def put(item: _Item) -> bool:
        while not stopped.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def prepare(line: Line) -> Prepared:
        picture = _read_png(line)
        return scorer.prepare(picture), picture.shape[:2]

    def read() -> None:
        try:
            for line in lines:
                if not put((line, pool.submit(prepare, line))):
                    return
            put(None)
        except BaseException as error:  # raised again where the lines are used
            put(error)

    with ThreadPoolExecutor(DECODERS, "decode") as pool:
        # A daemon: it may wait for a line of standard input that never comes.
        threading.Thread(target=read, name="read", daemon=True).start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            _drain(queue)


def _drain(queue: Queue[_Item]) -> None:
    while True:
        try:
            item = queue.get_nowait()
        except Empty:
            return
        if isinstance(item, tuple):
            item[1].cancel()


def _ranked(pool: list[Line], scorer: Scorer) -> list[Line]:
    # Ties keep the order of the samples, so that the result does not depend on the sort.
    ordered = sorted(pool, key=lambda line: -line["score"])
    return [{**line, "rank": rank, "scorer": scorer.name} for rank, line in enumerate(ordered, start=1)]


def printed(line: Line) -> str:
    """The line as JSON, its score rounded to six digits."""
    return json.dumps({**line, "score": round(line["score"], 6)}, ensure_ascii=False)


def _check_size(line: Line, size: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> None:
    """Samples of one store are of one size: another is not what ``dalle sample`` wrote."""
    store = line.get("store")
    if not isinstance(store, str):
        return
    expected = sizes.setdefault(store, size)
    if size != expected:
        told = [" x ".join(map(str, reversed(sides))) for sides in (size, expected)]
        raise UserError(
            f"{line['png']}: is {told[0]} pixels where other samples of {store} are {told[1]}; draw it again with "
            "dalle sample"
        )


def _read_png(line: Line) -> np.ndarray:
    path = Path(line["png"])
    try:
        return np.asarray(decode_image(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: the sample's picture is missing; draw it again with dalle sample") from None
    except (OSError, BadImage) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
