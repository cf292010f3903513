"""Reranking: of each caption's samples, the pictures that CLIP finds closest to it (paper, section 2.6).

Lines are scored while they come in. Files are read and pictures decoded and prepared by threads, beside the model where
it leaves cores idle, and batches run across captions, so that the model is what takes the time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dalle_cli.clip.scoring import Scorer
from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.source import is_unicode
from dalle_cli.data.workers import available_cores
from dalle_cli.errors import UserError
from dalle_cli.progress import log

Line = dict[str, Any]
BATCH = 64
BATCHES_AHEAD = 3
"""How far reading and decoding run ahead of the model."""
PIECE = 32
"""Pictures that a thread prepares at once: handing over each by itself would cost as much as decoding a small one."""
MOST_DECODERS = 16


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
    for chunk, pieces in _prepared(lines, scorer, batch):
        # In the order of lines, so that it is the first bad picture that is named.
        pictures = [picture for piece in pieces for picture in piece.result()]
        for line, (_, size) in zip(chunk, pictures, strict=True):
            _check_size(line, size, sizes)
        new = list(dict.fromkeys(line["prompt"] for line in chunk if line["prompt"] not in texts))
        if new:
            texts |= dict(zip(new, scorer.text_features(new), strict=True))
        features = scorer.prepared_features([prepared for prepared, _ in pictures])
        captions = torch.stack([texts[line["prompt"]] for line in chunk])
        for line, similarity in zip(chunk, (features * captions).sum(1).tolist(), strict=True):
            yield {**line, "score": similarity}


Piece = list[tuple[Tensor, tuple[int, ...]]]
"""Prepared pictures and their heights and widths."""
Batch = tuple[list[Line], list[Future[Piece]]]


def _prepared(lines: Iterable[Line], scorer: Scorer, batch: int) -> Iterator[Batch]:
    """Batches of lines with their pictures, which threads prepare; a thread reads ahead, as far as BATCHES_AHEAD.

    Where the model has all cores for itself, its pictures are prepared before it starts: beside it they would take
    those cores, and the interpreter's lock, from it.
    """
    queue: Queue[Batch | BaseException | None] = Queue(BATCHES_AHEAD)
    stopped = threading.Event()
    beside = torch.cuda.is_available() or torch.get_num_threads() < available_cores()

    def put(item: Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def prepare(piece: list[Line]) -> Piece:
        pictures = map(_read_png, piece)
        return [(scorer.prepare(picture), picture.shape[:2]) for picture in pictures]

    def begin(chunk: list[Line]) -> list[Future[Piece]]:
        return [pool.submit(prepare, chunk[start : start + PIECE]) for start in range(0, len(chunk), PIECE)]

    def read() -> None:
        rest = iter(lines)
        try:
            while chunk := list(islice(rest, batch)):
                if not put((chunk, begin(chunk) if beside else [])):
                    return
            put(None)
        except BaseException as error:  # raised again where the lines are used
            put(error)

    with ThreadPoolExecutor(min(available_cores(), MOST_DECODERS), "decode") as pool:
        # A daemon: it may wait for a line of standard input that never comes.
        threading.Thread(target=read, name="read", daemon=True).start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                chunk, pieces = item
                yield chunk, pieces or begin(chunk)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


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


def _read_png(line: Line) -> NDArray[np.uint8]:
    path = Path(line["png"])
    try:
        with path.open("rb", buffering=0) as file:
            return np.asarray(decode_image(file.read()))
    except FileNotFoundError:
        raise UserError(f"{path}: the sample's picture is missing; draw it again with dalle sample") from None
    except (OSError, BadImage) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
