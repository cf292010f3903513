"""SQLite store of a study's votes: a row for each annotator, item and question, synced to disk when recorded.

Progress, next tasks and excluded annotators are computed from the votes, so a killed server loses nothing.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType

from dalle_cli.errors import UserError
from dalle_cli.human_study.study import QUESTIONS, VOTES, Answer, Item, Question, Study
from dalle_cli.randomness import numpy_generator

BUSY_SECONDS = 1
"""Seconds that a vote waits for another one, or for another process with the database, before it is refused."""
_TABLES = """
CREATE TABLE IF NOT EXISTS study (sha256 TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS annotators (name TEXT PRIMARY KEY, code TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE IF NOT EXISTS votes (
    annotator TEXT NOT NULL, item TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (annotator, item, question)
) STRICT;
"""
# A table of each connection, filled from study.json.
_CHECKS = "CREATE TEMP TABLE checks (item TEXT PRIMARY KEY, answer TEXT NOT NULL)"
_EXCLUDED = """
SELECT annotator FROM votes JOIN checks USING (item)
WHERE votes.answer <> checks.answer AND votes.answer <> 'neither' -- the picture may match its caption badly
GROUP BY annotator HAVING count(*) > ?
"""


class VoteRefused(Exception):
    """A well-formed vote that is not recorded; the message says why."""


@dataclass(frozen=True)
class Annotator:
    """Someone who may vote: the name in results, and the secret code of the link to the page."""

    name: str
    code: str


@dataclass(frozen=True)
class Vote:
    """An answer of an annotator to a question about an item."""

    annotator: str
    item: str
    question: Question
    answer: Answer
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


class Votes:
    """Votes of a study, safe to use from several threads and processes at once.

    Reading has a connection of its own, so that no reader waits for a vote that cannot be recorded now.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        """Open the votes in ``folder``, or create them.

        Raises:
            UserError: the file holds another study's votes, or is not a writable database.
        """
        self.study = study
        self._writer_lock, self._reader_lock = Lock(), Lock()
        path = folder / VOTES
        try:
            self._writer = _connect(path, study)
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.executescript(_TABLES)
            with self._transaction():
                if self._writer.execute("SELECT count(*) FROM study").fetchone() == (0,):
                    self._writer.execute("INSERT INTO study VALUES (?)", (study.sha256,))
            self._reader = _connect(path, study)
            for db in (self._writer, self._reader):
                db.execute(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS}")
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used ({error}); check that it is a writable file of votes") from None
        if self._reader.execute("SELECT sha256 FROM study").fetchall() != [(study.sha256,)]:
            raise UserError(f"{path}: holds the votes of another study; move them back to their own folder")

    def annotators(self, number: int) -> list[Annotator]:
        """Return the first ``number`` annotators; those that are new get a code of 96 random bits."""
        with self._transaction():
            rows = self._writer.execute("SELECT name, code FROM annotators ORDER BY rowid").fetchall()
            known = [Annotator(*row) for row in rows]
            for place in range(len(known) + 1, number + 1):
                known.append(Annotator(f"annotator-{place:02d}", secrets.token_urlsafe(12)))
                self._writer.execute("INSERT INTO annotators VALUES (?, ?)", (known[-1].name, known[-1].code))
        return known[:number]

    def name_of(self, code: str) -> str | None:
        """Return the name of the annotator with this code, None if there is none."""
        with self._reader_lock:
            found = self._reader.execute("SELECT name FROM annotators WHERE code = ?", (code,)).fetchone()
        return None if found is None else str(found[0])

    def record(self, annotator: str, item: Item, question: Question, answer: Answer) -> None:
        """Record one vote; it is on disk when this returns.

        Raises:
            VoteRefused: the annotator answered this before, or the question has all the votes wanted.
            sqlite3.OperationalError: the database is busy, or the disk is full.
        """
        with self._transaction():
            mine = (annotator, item.id, question)
            before = self._writer.execute(
                "SELECT answer FROM votes WHERE (annotator, item, question) = (?, ?, ?)", mine
            ).fetchone()
            if before is not None:
                raise VoteRefused(f"this was answered before, with {before[0]}; the first answer is kept")
            counts = self._counts(self._writer)
            if item.check is None and counts.get((item.id, question), 0) >= self.study.annotators:
                raise VoteRefused(f"{self.study.annotators} annotators have answered this already")
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._writer.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (*mine, answer, at))

    def work(self, annotator: str) -> Work:
        """Return the annotator's number of finished items and open tasks, in this annotator's random order.

        A question about a pair is open until it has all its votes, without excluded annotators. Checks are for all.
        """
        with self._reader_lock:
            rows = self._reader.execute("SELECT item, question FROM votes WHERE annotator = ?", (annotator,)).fetchall()
            counts = self._counts(self._reader)
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
        with self._reader_lock:
            rows = self._reader.execute("SELECT annotator, item, question, answer, at FROM votes ORDER BY at, rowid")
            return [Vote(*row) for row in rows]

    def close(self) -> None:
        """Close the database."""
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _counts(self, db: sqlite3.Connection) -> dict[tuple[str, str], int]:
        """Count the votes on each item and question, without excluded annotators."""
        rows = db.execute(
            f"SELECT item, question, count(*) FROM votes WHERE annotator NOT IN ({_EXCLUDED}) GROUP BY item, question",
            (self.study.wrong_allowed,),
        )
        return {(item, question): count for item, question, count in rows}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Keep other writers out inside the block; what it wrote is on disk afterwards."""
        if not self._writer_lock.acquire(timeout=BUSY_SECONDS):
            raise sqlite3.OperationalError("other votes are being recorded")
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
        finally:
            self._writer_lock.release()


def _connect(path: Path, study: Study) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    db.execute(_CHECKS)
    db.executemany("INSERT INTO checks VALUES (?, ?)", [(item.id, item.check) for item in study.checks])
    return db


def _order(study: Study, annotator: str) -> list[Item]:
    """Return all items, shuffled for this annotator, with the checks spread evenly among the pairs."""
    random = numpy_generator(int(study.sha256[:15], 16), "human-study", "order", annotator)
    pairs = [study.pairs[place] for place in random.permutation(len(study.pairs))]
    checks = [study.checks[place] for place in random.permutation(len(study.checks))]
    places = [(place + 0.5) / len(pairs) for place in range(len(pairs))]
    places += [(place + random.random()) / len(checks) for place in range(len(checks))]
    return [item for _, item in sorted(zip(places, [*pairs, *checks], strict=True), key=lambda entry: entry[0])]
