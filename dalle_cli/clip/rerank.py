"""Reranking of each caption's samples by CLIP similarity (paper, section 2.6).

Lines are scored as they arrive, in batches across captions. To keep the model busy, threads read, decode and prepare
pictures, while the model runs if it leaves cores idle.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import Full, Queue

import torch
from torch import Tensor

from dalle_cli.clip.scorer import Scorer
from dalle_cli.data.images import read_picture
from dalle_cli.data.sample_lines import SampleLine
from dalle_cli.data.workers import available_cores
from dalle_cli.errors import UserError
from dalle_cli.progress import log, printable_json

BATCH = 64
BATCHES_AHEAD = 3
"""Number of batches that are prefetched."""
PIECE = 32
"""Number of pictures per thread task; a task's overhead is as large as decoding a small picture."""
MAX_DECODERS = 16


def rerank(
    lines: Iterable[SampleLine], scorer: Scorer, *, batch: int = BATCH, gather: bool = False
) -> Iterator[list[SampleLine]]:
    """Yield each prompt's lines with ``score`` (cosine similarity), ``rank`` (from 1) and ``scorer``, best first.

    A prompt's lines are yielded once the next prompt begins and their batch is scored, so a stream of many prompts is
    never in memory whole. With ``gather``, all lines are collected first, and a prompt's lines need not be consecutive.

    Raises:
        UserError: a picture is missing or unreadable, or has another size than the others of its store.
    """
    pools: dict[str, list[SampleLine]] = {}
    done: set[str] = set()
    warned = False
    for line in score(lines, scorer, batch):
        prompt = line["prompt"]
        if prompt not in pools and not gather:
            for earlier, pool in pools.items():
                done.add(earlier)
                yield _ranked(pool, scorer)
            pools.clear()
            if prompt in done and not warned:
                warned = True
                log(
                    f"rerank: the samples of {prompt!r} are not consecutive and are ranked apart; name their files "
                    "as arguments to rank them together"
                )
        pools.setdefault(prompt, []).append(line)
    for pool in pools.values():
        yield _ranked(pool, scorer)
    if scorer.captions_cut:
        log(f"rerank: captions cut to the tokens that CLIP reads: {scorer.captions_cut}")


def best_of_all(pools: Iterable[list[SampleLine]], top: int | None) -> list[SampleLine]:
    """Return the best lines of all prompts together, with new ranks; all lines if ``top`` is None."""
    lines = (line for pool in pools for line in pool)
    best = heapq.nsmallest(top, lines, _worst_last) if top is not None else sorted(lines, key=_worst_last)
    return [{**line, "rank": rank} for rank, line in enumerate(best, start=1)]


def score(lines: Iterable[SampleLine], scorer: Scorer, batch: int = BATCH) -> Iterator[SampleLine]:
    """Yield the lines with an unrounded ``score``, in their order.

    A batch is always ``batch`` lines, however slowly they arrive, so the same lines get the same scores. A caption's
    features are computed once.

    Raises:
        UserError: a picture is missing or unreadable, or has another size than the others of its store.
    """
    texts: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for chunk, pieces in _prepared(lines, scorer, batch):
        # In the order of the lines, so that the error names the first bad picture.
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
"""Prepared pictures, each with its original height and width."""
Batch = tuple[list[SampleLine], list[Future[Piece]]]


def _prepared(lines: Iterable[SampleLine], scorer: Scorer, batch: int) -> Iterator[Batch]:
    """Yield batches of lines with the futures of their prepared pictures, prefetching up to BATCHES_AHEAD batches.

    If the model uses all cores, a batch's pictures are prepared before the model runs, since preparing them meanwhile
    would take cores and the GIL from it.
    """
    queue: Queue[Batch | BaseException | None] = Queue(BATCHES_AHEAD)
    stopped = threading.Event()
    overlap = torch.cuda.is_available() or torch.get_num_threads() < available_cores()

    def put(item: Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def prepare(piece: list[SampleLine]) -> Piece:
        pictures = (read_picture(Path(line["png"]), "draw it again with dalle sample") for line in piece)
        return [(scorer.prepare(picture), picture.shape[:2]) for picture in pictures]

    def begin(chunk: list[SampleLine]) -> list[Future[Piece]]:
        return [pool.submit(prepare, chunk[start : start + PIECE]) for start in range(0, len(chunk), PIECE)]

    def read() -> None:
        rest = iter(lines)
        try:
            while chunk := list(islice(rest, batch)):
                if not put((chunk, begin(chunk) if overlap else [])):
                    return
            put(None)
        except BaseException as error:  # raised again in the consuming thread
            put(error)

    with ThreadPoolExecutor(min(available_cores(), MAX_DECODERS), "decode") as pool:
        # A daemon thread, since it may wait forever for a line of standard input.
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


def _ranked(pool: list[SampleLine], scorer: Scorer) -> list[SampleLine]:
    # Python's sort is stable, so ties keep the order of the samples.
    ordered = sorted(pool, key=_worst_last)
    return [{**line, "rank": rank, "scorer": scorer.name} for rank, line in enumerate(ordered, start=1)]


def _worst_last(line: SampleLine) -> float:
    return -float(line["score"])


def printed(line: SampleLine) -> str:
    """Return the line as JSON, with its score rounded to six digits."""
    return printable_json({**line, "score": round(line["score"], 6)})


def _check_size(line: SampleLine, size: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a picture of another size than the others of its store, since ``dalle sample`` did not write it."""
    store = line.get("store")
    if not isinstance(store, str):
        return
    expected = sizes.setdefault(store, size)
    if size != expected:
        here, others = (" x ".join(map(str, reversed(sides))) for sides in (size, expected))
        raise UserError(
            f"{line['png']}: is {here} pixels where other samples of {store} are {others}; draw it again with "
            "dalle sample"
        )
