"""Lines of samples as columns, for commands that hold hundreds of samples of each of thousands of captions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.sample_lines import SampleLine

T = TypeVar("T")
SHARED = ("prompt", "id", "store", "seed", "scorer")
"""Keys whose values the samples of a caption share."""
NO_RANK = -(2**31)


class SampleTable:
    """Samples in columns, which take about 30 bytes a sample and the name of its file; a dict takes 2,000.

    Only the keys in SHARED, ``png``, ``index``, ``score`` and ``rank`` are kept.
    """

    def __init__(self, lines: Iterable[SampleLine] = ()) -> None:
        self._shared = _Column()
        """Values of the keys in SHARED, and the folder of the picture, as a tuple."""
        self._indices = _Column()
        self._names = bytearray()
        """File names of all pictures, joined, in UTF-8."""
        self._ends = array("q", [0])
        """End of each file name, after the beginning of the first (n + 1,)."""
        self._scores = array("d")
        """Scores (n,); NaN for a sample without one."""
        self._ranks = array("i")
        for line in lines:
            self.append(line)

    def __len__(self) -> int:
        return len(self._scores)

    def append(self, line: SampleLine) -> None:
        """Add a sample; a value of a type that ``dalle`` does not write counts as missing."""
        folder, slash, name = line["png"].rpartition("/")
        self._shared.append((*(_plain(line.get(key)) for key in SHARED), folder + slash))
        self._indices.append(_plain(line.get("index")))
        self._names += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._names))
        self._scores.append(line["score"] if has_score(line) else nan)
        self._ranks.append(line["rank"] if has_rank(line) else NO_RANK)

    def line(self, row: int, prompt: str | None = None) -> SampleLine:
        """Return the sample of a row; ``prompt`` replaces its own."""
        values = zip((*SHARED, "index"), (*self._shared[row][:-1], self._indices[row]), strict=True)
        line: SampleLine = {key: value for key, value in values if value is not None}
        line["png"] = self._png(row)
        if not np.isnan(self._scores[row]):
            line["score"] = self._scores[row]
        if self._ranks[row] != NO_RANK:
            line["rank"] = self._ranks[row]
        return line if prompt is None else line | {"prompt": prompt}

    def lines(self, rows: NDArray[np.int64], prompt: str | None = None) -> Sequence[SampleLine]:
        """Return the samples of ``rows`` (n,); ``prompt`` replaces their own."""
        return _OnDemand(partial(self.line, prompt=prompt), rows)

    def paths(self, rows: NDArray[np.int64]) -> Sequence[Path]:
        """Return the files of the pictures of ``rows`` (n,)."""
        return _OnDemand(self._path, rows)

    def scored(self, rows: NDArray[np.int64]) -> bool:
        """Return whether all of ``rows`` (n,) have a score."""
        return not np.isnan(np.asarray(self._scores)[rows]).any()

    def grouped(self, key: str, name: Callable[[Any], str]) -> dict[str, NDArray[np.int64]]:
        """Return the rows of the samples whose values of ``key`` have the same ``name``, in the order of first rows.

        Samples without the key, which is one of SHARED, are left out.
        """
        values = [shared[SHARED.index(key)] for shared in self._shared.values]
        names = [None if value is None else name(value) for value in values]
        groups = {found: group for group, found in enumerate(dict.fromkeys(n for n in names if n is not None))}
        numbers = np.array([len(groups) if n is None else groups[n] for n in names], np.int32)
        of_row = numbers[np.asarray(self._shared.numbers)]
        ends = np.cumsum(np.bincount(of_row, minlength=len(groups))[: len(groups)])
        return dict(zip(groups, np.split(np.argsort(of_row, kind="stable"), ends)[:-1], strict=True))

    def best_first(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the different samples among ``rows`` (n,), which have scores, best first.

        Samples with the same store, seed and index are the same sample of a repeated caption, and count once.
        """
        distinct: dict[Any, int] = {}
        for row in rows.tolist():
            _, _, store, seed, *_ = self._shared[row]
            identity = store, seed, self._indices[row]
            distinct.setdefault(row if None in identity else identity, row)
        kept = np.fromiter(distinct.values(), np.int64, len(distinct))
        ranks = np.asarray(self._ranks)[kept]
        # Ranks follow unrounded scores, so they break the ties that rounding made; without ranks the rows do.
        return kept[np.lexsort((np.where(ranks == NO_RANK, kept, ranks), -np.asarray(self._scores)[kept]))]

    def _png(self, row: int) -> str:
        name = self._names[self._ends[row] : self._ends[row + 1]]
        return str(self._shared[row][-1]) + name.decode("utf-8", "surrogatepass")

    def _path(self, row: int) -> Path:
        return Path(self._png(row))


def has_score(line: SampleLine) -> bool:
    """Return whether the sample has a score, which fits in 64 bits."""
    score = line.get("score")
    return isinstance(score, float) or (isinstance(score, int) and abs(score) < 2**63)


def has_rank(line: SampleLine) -> bool:
    """Return whether the sample has a rank, which fits in 32 bits."""
    rank = line.get("rank")
    return isinstance(rank, int) and abs(rank) < 2**31


def _plain(value: Any) -> str | float | None:
    return value if isinstance(value, str | int | float) else None


class _Column:
    """A column whose values repeat: each is held once, and a row takes four bytes."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.numbers = array("i")
        """Number of each row's value in ``values`` (n,)."""
        self._number_of: dict[Any, int] = {}

    def append(self, value: Any) -> None:
        number = self._number_of.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        self.numbers.append(number)

    def __getitem__(self, row: int) -> Any:
        return self.values[self.numbers[row]]


class _OnDemand(Sequence[T], Generic[T]):
    """A sequence whose items ``make`` builds from the numbers in ``rows`` (n,), whenever they are asked for."""

    def __init__(self, make: Callable[[int], T], rows: NDArray[np.int64]) -> None:
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> _OnDemand[T]: ...

    def __getitem__(self, place: int | slice) -> T | _OnDemand[T]:
        if isinstance(place, slice):
            return _OnDemand(self._make, self._rows[place])
        return self._make(int(self._rows[place]))
