"""Samples of shards on servers, whose bytes are fetched in few requests before they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from dalle_cli.data.exclude import SourceWithExclusions
from dalle_cli.data.formats.shard_index import IMAGE, JSON, TEXT
from dalle_cli.data.formats.webdataset import WebDatasetSource
from dalle_cli.data.joined import JoinedSource
from dalle_cli.data.prefetch import prefetch
from dalle_cli.data.remote import GAP, RemoteFile, holding
from dalle_cli.data.source import Source

What = Literal["captions", "images", "both"]
_ROLES: dict[What, tuple[int, ...]] = {"captions": (TEXT, JSON), "images": (IMAGE,), "both": (IMAGE, TEXT, JSON)}
_AT_ONCE = 16
"""Number of shards that are read at once where samples are not in order."""
PIECE = 8 << 20
"""Bytes that are fetched together, if no single sample has more."""
_MOST_ROWS = 4096
"""Number of samples that are fetched together, however small they are."""


def on_server(source: Source) -> bool:
    """Return whether samples of a source may be read from a server, which a fork of this process could not do."""
    if isinstance(source, SourceWithExclusions):
        return on_server(source.source)
    if isinstance(source, JoinedSource):
        return any(map(on_server, source.sources))
    return isinstance(source, WebDatasetSource) and source.on_server


def rows_ahead(source: Source, rows: Iterable[int], what: What) -> Iterator[int]:
    """Yield ``rows`` one by one, each once its captions or its image can be read without a request of their own.

    Up to three pieces of PIECE bytes are in memory: one in use, one that is ready, and one that comes.

    Raises:
        UserError: a shard cannot be reached.
    """
    if not on_server(source):
        yield from rows
        return
    for piece, held in prefetch(_fetched(source, rows, what), 1):
        with holding(held):
            yield from piece


def _fetched(
    source: Source, rows: Iterable[int], what: What
) -> Iterator[tuple[list[int], dict[tuple[str, int], bytes]]]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for piece, wanted in _pieces(source, rows, what):
            held = {}
            read = pool.map(RemoteFile.read_many, wanted, wanted.values())
            for (file, ranges), found in zip(wanted.items(), read, strict=True):
                held.update({(file.url, offset): data for (offset, _), data in zip(ranges, found, strict=True)})
            yield piece, held


def _pieces(
    source: Source, rows: Iterable[int], what: What
) -> Iterator[tuple[list[int], dict[RemoteFile, list[tuple[int, int]]]]]:
    """Yield rows whose bytes are fetched together, with the ranges, (offset, size), to read of each shard."""
    piece: list[int] = []
    wanted: dict[RemoteFile, list[tuple[int, int]]] = defaultdict(list)
    size = 0
    for row in rows:
        found = _ranges(source, row, what)
        more = sum(length for _, _, length in found)
        for file, offset, _ in found:
            # Ranges that lie near to each other are read as one, with the bytes between them.
            before = wanted[file][-1] if file in wanted else None
            gap = offset - sum(before) if before is not None else 0
            more += gap if 0 < gap <= GAP else 0
        if piece and (size + more > PIECE or len(piece) == _MOST_ROWS):
            yield piece, wanted
            piece, wanted, size = [], defaultdict(list), 0
        piece.append(row)
        size += more
        for file, offset, length in found:
            wanted[file].append((offset, length))
    if piece:
        yield piece, wanted


def _ranges(source: Source, row: int, what: What) -> list[tuple[RemoteFile, int, int]]:
    """Return the file, the offset and the size of all that is read of a sample on a server."""
    if isinstance(source, SourceWithExclusions):
        return _ranges(source.source, row, what)
    if isinstance(source, JoinedSource):
        number, own = source.place(row)
        return _ranges(source.sources[number], own, what)
    return source.ranges(row, _ROLES[what]) if isinstance(source, WebDatasetSource) else []
