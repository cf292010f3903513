"""Shares of the work of independent jobs (``--shard I/N``), and the progress of each share of a token store.

All jobs write into one token store. Their shares begin where the store's shard files begin, so that no two jobs write
the same file. The progress of each share stands in files of its own, in the store's folder ``progress``:

- ``image-0003-of-0008.json``: its ``ShareProgress``, replaced after each block of rows;
- ``image-0003-of-0008.jsonl``: the samples it skipped;
- ``image-0003-of-0008.lock``: locked while a process makes the share;

A further file, ``lock``, is locked while a process changes keys, shapes of arrays or the group's attributes. The job
that completes a part removes these files, so that a complete store holds the same bytes however it was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dalle_cli.errors import Damaged, UserError
from dalle_cli.stores.files import write_json
from dalle_cli.stores.typed import Count, read_typed

Part = Literal["text", "image"]
COMMANDS: dict[Part, str] = {"text": "tokenize-text", "image": "encode-images"}
"""Command that makes each part of a token store."""


@dataclass(frozen=True, order=True)
class Shard:
    """The ``number``-th of ``of`` equal shares of the work, counted from 1; 1/1 is all of it."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"no shard {self.number} of {self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, samples: int, multiple: int) -> range:
        """Return the share's rows of ``samples``; it begins at a multiple of ``multiple`` and may be empty."""
        files = -(-samples // multiple)
        start, stop = (files * n // self.of * multiple for n in (self.number - 1, self.number))
        return range(min(start, samples), min(stop, samples))


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """Parse I/N, such as ``"3/8"``.

    Raises:
        UserError: ``text`` has another form, or I is not from 1 to N.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: write I/N with I from 1 to N, such as 1/8 for the first of eight")
    return Shard(int(match[1]), int(match[2]))


def join_names(shards: Iterable[Shard]) -> str:
    """Return the names of shares for a message, the first ten of many."""
    names = [str(shard) for shard in shards]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def parts_folder(whole: Path) -> Path:
    """Return the folder that holds the shares of the samples ``whole``."""
    return whole.with_name(f"{whole.name}.parts")


@dataclass(frozen=True)
class ShareProgress:
    """Progress of one share of a part: its committed rows, and the number of skipped samples by reason."""

    samples: Count
    """Number of samples of the whole source."""
    identity: dict[str, Any]
    rows: Count = 0
    skipped: dict[str, Count] = field(default_factory=dict)
    counts: dict[str, Count] = field(default_factory=dict)
    bytes: dict[str, Count] | None = None
    """Size of the shard files of each array, with those of ``key``; None if an earlier version wrote some of them."""


@dataclass(frozen=True)
class Shares:
    """The progress files of one part of the token store ``store``."""

    store: Path
    part: Part

    @property
    def folder(self) -> Path:
        return self.store / "progress"

    def file(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{self.part}-{shard.number:04d}-of-{shard.of:04d}{suffix}"

    def report(self, shard: Shard) -> Path:
        """Return the file that lists what a share skipped; a single job writes the store's list itself."""
        return self.store / f"skipped-{self.part}.jsonl" if shard == WHOLE else self.file(shard, ".jsonl")

    def begun(self) -> list[Shard]:
        """Return the shares that have been begun, in order."""
        names = (
            re.fullmatch(rf"{self.part}-([0-9]{{4,9}})-of-([0-9]{{4,9}})\.json", path.name)
            for path in self.folder.glob("*.json")
        )
        numbers = ((int(name[1]), int(name[2])) for name in names if name is not None)
        return sorted(Shard(number, of) for number, of in numbers if 1 <= number <= of)

    def read(self, shard: Shard) -> ShareProgress | None:
        """Return the progress of a share, None if it has not been begun."""
        file = self.file(shard, ".json")
        try:
            return read_typed(ShareProgress, file)
        except Damaged as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def all(self) -> dict[Shard, ShareProgress]:
        """Return the progress of each share that has been begun, in order."""
        found = ((shard, self.read(shard)) for shard in self.begun())
        return {shard: now for shard, now in found if now is not None}

    def write(self, shard: Shard, progress: ShareProgress) -> None:
        """Commit the progress of a share."""
        write_json(self.file(shard, ".json"), asdict(progress))

    def unfinished(self, of: int, samples: int, multiple: int) -> list[Shard]:
        """Return those of the ``of`` shares that have not been begun or still lack rows."""
        every = {shard: self.read(shard) for shard in (Shard(number, of) for number in range(1, of + 1))}
        return [shard for shard, now in every.items() if now is None or now.rows < len(shard.rows(samples, multiple))]

    def committed(self, rows: range, samples: int, multiple: int) -> bool:
        """Return whether ``rows``, which lie in one shard file, are committed."""
        for shard in self.begun():
            share = shard.rows(samples, multiple)
            if rows.start in share:
                now = self.read(shard)
                return now is not None and rows.stop <= share.start + now.rows
        return False

    def remove(self, keep: Path) -> None:
        """Delete the progress files of all shares but ``keep``."""
        for path in self.folder.glob(f"*{self.part}-*"):
            if path != keep:
                path.unlink(missing_ok=True)
