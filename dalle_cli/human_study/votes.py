"""SQLite store of a study's votes: a row for each annotator, item and question, synced to disk when recorded.

Progress, next tasks and excluded annotators are computed from the votes, so a killed server loses nothing.
"""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType

from dalle_cli.errors import UserError
from dalle_cli.human_study.study import QUESTIONS, VOTES, Item, Question, Side, Study
from dalle_cli.randomness import numpy_generator

MAX_NAME_LENGTH = 64
_TABLES = """
CREATE TABLE IF NOT EXISTS study (sha256 TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS votes (
    annotator TEXT NOT NULL, item TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (annotator, item, question)
) STRICT;
"""
# A table of this connection alone, filled from study.json.
_CHECKS = "CREATE TEMP TABLE checks (item TEXT PRIMARY KEY, answer TEXT NOT NULL)"
_EXCLUDED = """
SELECT annotator FROM votes JOIN checks USING (item) WHERE votes.answer <> checks.answer
GROUP BY annotator HAVING count(*) > ?
"""


class VoteRefused(Exception):
    """A well-formed vote that is not recorded; the message says why."""


@dataclass(frozen=True)
class Vote:
    """An answer of an annotator to a question about an item."""

    annotator: str
    item: str
    question: Question
    answer: Side
    at: str
    """Time in UTC, ISO 8601."""


@dataclass(frozen=True)
class Task:
    """An item and the open questions about it for an annotator, in order."""

    item: Item
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Work:
    """Number of items that an annotator has done, and the tasks left, the next one first."""

    done: int
    tasks: tuple[Task, ...]


def annotator_name(text: str) -> str:
    """Normalize an annotator's name: ``ANNA `` becomes ``anna``.

    Raises:
        ValueError: the name is not 1 to 64 printable characters.
    """
    name = " ".join(unicodedata.normalize("NFKC", text).split()).casefold()
    if not 1 <= len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"a name has 1 to {MAX_NAME_LENGTH} printable characters")
    return name


class Votes:
    """Votes of a study, safe to use from several threads and processes at once."""

    def __init__(self, folder: Path, study: Study) -> None:
        """Open the votes in ``folder``, or create them.

        Raises:
            UserError: the file holds another study's votes, or is not a writable database.
        """
        self.study = study
        self._lock = Lock()
        path = folder / VOTES
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_TABLES + _CHECKS)
            with self._transaction():
                if self._db.execute("SELECT count(*) FROM study").fetchone() == (0,):
                    self._db.execute("INSERT INTO study VALUES (?)", (study.sha256,))
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used ({error}); check that it is a writable file of votes") from None
        if self._db.execute("SELECT sha256 FROM study").fetchall() != [(study.sha256,)]:
            raise UserError(f"{path}: holds the votes of another study; move them back to their own folder")
        rows = [(item.id, item.check) for item in study.checks]
        self._db.executemany("INSERT INTO checks VALUES (?, ?)", rows)

    def record(self, annotator: str, item: Item, question: Question, answer: Side) -> None:
        """Record one vote; it is on disk when this returns.

        Raises:
            VoteRefused: the annotator answered this before, or the question has all the votes wanted.
        """
        with self._lock, self._transaction():
            mine = (annotator, item.id, question)
            before = self._db.execute(
                "SELECT answer FROM votes WHERE (annotator, item, question) = (?, ?, ?)", mine
            ).fetchone()
            if before is not None:
                raise VoteRefused(f"this was answered before, with {before[0]}; the first answer is kept")
            if item.check is None and self._counts().get((item.id, question), 0) >= self.study.annotators:
                raise VoteRefused(f"{self.study.annotators} annotators have answered this already")
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._db.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (*mine, answer, at))

    def work(self, annotator: str) -> Work:
        """Return the annotator's number of finished items and open tasks, in this annotator's random order.

        A question about a pair is open until it has all its votes, without excluded annotators. Checks are for all.
        """
        with self._lock:
            rows = self._db.execute("SELECT item, question FROM votes WHERE annotator = ?", (annotator,)).fetchall()
            counts = self._counts()
        answered = set(rows)
        tasks = []
        for item in _order(self.study, annotator):
            open_questions = tuple(
                question
                for question in QUESTIONS
                if (item.id, question) not in answered
                and (item.check is not None or counts.get((item.id, question), 0) < self.study.annotators)
            )
            if open_questions:
                tasks.append(Task(item, open_questions))
        unfinished = {task.item.id for task in tasks}
        return Work(len({item for item, _ in rows} - unfinished), tuple(tasks))

    def all(self) -> list[Vote]:
        """Return all votes, ordered by time."""
        with self._lock:
            rows = self._db.execute("SELECT annotator, item, question, answer, at FROM votes ORDER BY at, rowid")
            return [Vote(*row) for row in rows]

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _counts(self) -> dict[tuple[str, str], int]:
        """Count the votes on each item and question, without excluded annotators."""
        rows = self._db.execute(
            f"SELECT item, question, count(*) FROM votes WHERE annotator NOT IN ({_EXCLUDED}) GROUP BY item, question",
            (self.study.wrong_allowed,),
        )
        return {(item, question): count for item, question, count in rows}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _order(study: Study, annotator: str) -> list[Item]:
    """Return all items, shuffled for this annotator, with the checks spread evenly among the pairs."""
    random = numpy_generator(int(study.sha256[:15], 16), "human-study", "order", annotator)
    pairs = [study.pairs[place] for place in random.permutation(len(study.pairs))]
    checks = [study.checks[place] for place in random.permutation(len(study.checks))]
    places = [(place + 0.5) / len(pairs) for place in range(len(pairs))]
    places += [(place + random.random()) / len(checks) for place in range(len(checks))]
    return [item for _, item in sorted(zip(places, [*pairs, *checks], strict=True), key=lambda entry: entry[0])]
