"""Several sources as one: their samples follow one another, and their keys begin with the number of the source."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from dalle_cli.data.exclude import SourceWithExclusions
from dalle_cli.data.index import hash_members
from dalle_cli.data.source import Source


class JoinedSource:
    """The samples of several sources in order; sample KEY of the second one has the key 1/KEY."""

    format = "joined"

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.skipped = [(f"{n}/{key}", reason) for n, each in enumerate(sources) for key, reason in each.skipped]
        self.identity = hash_members([(source.identity,) for source in sources])
        self._ends = list(accumulate(len(source) for source in sources))

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each source."""
        return [len(source) for source in self.sources]

    def describe(self) -> str:
        return "; ".join(source.describe() for source in self.sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def key(self, i: int) -> str:
        number, row = self.place(i)
        return f"{number}/{self.sources[number].key(row)}"

    def captions(self, i: int) -> list[str]:
        number, row = self.place(i)
        return self.sources[number].captions(row)

    def image_bytes(self, i: int) -> bytes:
        number, row = self.place(i)
        return self.sources[number].image_bytes(row)

    def place(self, i: int) -> tuple[int, int]:
        """Return the number of a sample's source, and its row there."""
        i = range(len(self))[i]
        number = bisect_right(self._ends, i)
        return number, i - (self._ends[number - 1] if number else 0)


def sizes_of(source: Source) -> list[int]:
    """Return the number of samples of each source that a source is joined of, or of the source alone."""
    if isinstance(source, SourceWithExclusions):
        return sizes_of(source.source)
    return source.sizes if isinstance(source, JoinedSource) else [len(source)]
