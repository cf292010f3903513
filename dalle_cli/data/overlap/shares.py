"""A comparison in shares (``dalle overlap --shard I/N``), each by jobs of its own.

The pictures that a share is compared with are those of all shares. So each job first makes the thumbnails of its share,
with the marks that tell them apart. Once these are there for all shares, each job finds the pairs of its share, and the
last one joins them.
"""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from dalle_cli.data.overlap.pairs import Pairs, join_pairs, near_duplicates
from dalle_cli.data.overlap.pictures import MARKS, Marks, UniquePictures, distinct_pictures, mark_rows
from dalle_cli.data.overlap.search import Comparison, Overlap, overlap_of
from dalle_cli.data.overlap.thumbnails import ThumbnailFiles, make_thumbnails, source_hash
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import explain_os_errors, write_atomically
from dalle_cli.stores.shards import Shard, join_names
from dalle_cli.stores.share_files import ShareFiles, hash_of

_DIGEST_BYTES = hashlib.sha256().digest_size


class _PairLists(NamedTuple):
    """``Pairs`` for JSON."""

    a: list[int]
    b: list[int]
    distance: list[int]
    similarity: list[float]


def overlap_share(train: Source, other: Source | None, cache: Path, shard: Shard, how: Comparison) -> Overlap | None:
    """Do what can be done for a share so far; return what ``find_overlap`` would once all shares are compared.

    Thumbnails of a share are made where they are missing, and a share that was compared is not compared again.

    Raises:
        UserError: ``cache`` has shares of another number or of another threshold, a damaged one, or cannot be written.
    """
    sources = [_SourceShares(source, cache, shard.of) for source in (train, other) if source is not None]
    for source in sources:
        source.make(shard, how)
    if missing := sorted({each for source in sources for each in source.missing()}):
        log(
            f"overlap: the thumbnails of share {shard} are made; still to be made: {join_names(missing)}; then run all "
            "shares again, to compare them"
        )
        return None
    marks = [mark for source in sources for mark in source.digests()]
    made_of = {"similarity": how.threshold, "max_pixels": how.max_pixels, "marks": hash_of(marks)}
    folder = cache / f"{'-'.join(source.name for source in sources)}.pairs"
    files = ShareFiles(folder, shard.of, made_of, TypeAdapter(_PairLists))
    pictures = functools.cache(lambda: _pictures(sources))

    def compare() -> _PairLists:
        own = near_duplicates(*pictures(), workers=how.workers, threshold=how.threshold, folder=cache, shard=shard)
        return _PairLists(*(field.tolist() for field in own))

    found = files.read_with(shard, compare)
    if missing := [each for each, there in found.items() if there is None]:
        log(f"overlap: share {shard} is compared; still to be compared: {join_names(missing)}")
        return None
    a, b = pictures()
    every = [
        Pairs(np.array(p.a, np.int64), np.array(p.b, np.int64), np.array(p.distance, np.int64),
              np.array(p.similarity, np.float32))
        for p in found.values() if p is not None
    ]  # fmt: skip
    return overlap_of(train, other, a, b, join_pairs(every, b is None))


def _pictures(sources: list[_SourceShares]) -> tuple[UniquePictures, UniquePictures | None]:
    first, *others = (source.pictures() for source in sources)
    return first, others[0] if others else None


class _SourceShares:
    """The thumbnails of the shares of a source, and their marks, as files in a folder.

    Raises:
        UserError: the folder has shares of another number.
    """

    def __init__(self, source: Source, folder: Path, of: int) -> None:
        self.source, self.folder = source, folder
        self.name = source_hash(source)
        self._shards = [Shard(number, of) for number in range(1, of + 1)]
        for file in sorted(folder.glob(f"{self.name}-*-of-*.thumbnails")):
            if not file.stem.endswith(f"-of-{of:04d}"):
                raise UserError(
                    f"{file}: is of another number of shares than {of}; delete such files, or keep to that number"
                )

    def make(self, shard: Shard, how: Comparison) -> None:
        """Make what a share lacks; its marks are written last."""
        rows, thumbnails, marks = self._rows(shard), self._file(shard, ".thumbnails"), self._file(shard, ".marks")
        make_thumbnails(self.source, rows, thumbnails, max_pixels=how.max_pixels, workers=how.workers)
        if not marks.is_file():
            made = mark_rows(ThumbnailFiles([(thumbnails, len(rows))]), range(len(rows)), how.workers)
            written = io.BytesIO()
            np.save(written, made)
            data = written.getvalue()
            write_atomically(marks, data + hashlib.sha256(data).digest())

    def missing(self) -> list[Shard]:
        """Return the shares that have not been made."""
        return [shard for shard in self._shards if not self._file(shard, ".marks").is_file()]

    def digests(self) -> list[str]:
        """Return the hash of the marks of each share.

        Raises:
            UserError: a file is damaged.
        """
        return [hashlib.sha256(self._content(shard)).hexdigest() for shard in self._shards]

    def pictures(self) -> UniquePictures:
        """Return the distinct pictures of all shares.

        Raises:
            UserError: a file is damaged.
        """
        files = [(self._file(shard, ".thumbnails"), len(self._rows(shard))) for shard in self._shards]
        return distinct_pictures(ThumbnailFiles(files), np.concatenate([self._marks(shard) for shard in self._shards]))

    def _rows(self, shard: Shard) -> range:
        return shard.rows(len(self.source), 1)

    def _file(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{self.name}-{shard.number:04d}-of-{shard.of:04d}{suffix}"

    def _marks(self, shard: Shard) -> Marks:
        try:
            marks: Marks = np.load(io.BytesIO(self._content(shard)), allow_pickle=False)
            if marks.dtype != MARKS or marks.shape != (len(self._rows(shard)),):
                raise ValueError("it has another shape")
        except (ValueError, EOFError) as error:
            raise self._damage(shard, error) from None
        return marks

    def _content(self, shard: Shard) -> bytes:
        """Return what was written into a share's file of marks, without the hash at its end."""
        file = self._file(shard, ".marks")
        with explain_os_errors(file):
            written = file.read_bytes()
        data, digest = written[:-_DIGEST_BYTES], written[-_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise self._damage(shard, ValueError())
        return data

    def _damage(self, shard: Shard, error: Exception) -> UserError:
        file, reason = self._file(shard, ".marks"), type(error).__name__
        return UserError(f"{file}: is damaged ({reason}); delete it and make share {shard} again")
