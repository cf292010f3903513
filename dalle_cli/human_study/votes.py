"""The votes, in SQLite: one for each annotator, item and question, on the disk before it is acknowledged.

Everything else (progress, who is asked what next, who failed) is read from the votes, so a server that is killed
and started again knows all it knew.
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

LONGEST_NAME = 64
_TABLES = """
CREATE TABLE IF NOT EXISTS study (sha256 TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS votes (
    annotator TEXT NOT NULL, item TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (annotator, item, question)
) STRICT;
"""
# The checks' answers come from the study, into a table of this connection alone.
_CHECKS = "CREATE TEMP TABLE checks (item TEXT PRIMARY KEY, answer TEXT NOT NULL)"
_FAILED = """
SELECT annotator FROM votes JOIN checks USING (item) WHERE votes.answer <> checks.answer
GROUP BY annotator HAVING count(*) > ?
"""


class Refused(Exception):
    """A vote that is well-formed but does not count, and why."""


@dataclass(frozen=True)
class Vote:
    annotator: str
    item: str
    question: Question
    answer: Side
    at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Task:
    """An item and what an annotator is still to be asked about it, in the order of asking."""

    item: Item
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Work:
    """What an annotator has done and has to do; ``tasks`` begins with the next one."""

    done: int
    tasks: tuple[Task, ...]


def annotator_name(text: str) -> str:
    """One spelling of a name: ``ANNA `` is ``anna``. Raises ValueError unless it is 1 to 64 printable characters."""
    name = " ".join(unicodedata.normalize("NFKC", text).split()).casefold()
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name has 1 to {LONGEST_NAME} printable characters")
    return name


class Votes:
    """A study's votes; may be used from several threads, and by several processes at once."""

    def __init__(self, folder: Path, study: Study) -> None:
        """Opens ``folder``'s votes, or begins them. Raises UserError if they are another study's or no votes."""
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
            raise UserError(f"{path}: cannot be used ({error}); is it a study's, and may it be written?") from None
        if self._db.execute("SELECT sha256 FROM study").fetchall() != [(study.sha256,)]:
            raise UserError(f"{path}: holds the votes of another study; put them back to where they belong")
        rows = [(item.id, item.check) for item in study.checks]
        self._db.executemany("INSERT INTO checks VALUES (?, ?)", rows)

    def record(self, annotator: str, item: Item, question: Question, answer: Side) -> None:
        """Keep one vote: it is on the disk when this returns.

        Raises:
            Refused: the annotator answered this before, or others have given all answers that are wanted.
        """
        with self._lock, self._transaction():
            mine = (annotator, item.id, question)
            before = self._db.execute(
                "SELECT answer FROM votes WHERE (annotator, item, question) = (?, ?, ?)", mine
            ).fetchone()
            if before is not None:
                raise Refused(f"this was answered before, with {before[0]}; the first answer is kept")
            if item.check is None and self._counts().get((item.id, question), 0) >= self.study.annotators:
                raise Refused(f"{self.study.annotators} annotators have answered this already")
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._db.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (*mine, answer, at))

    def work(self, annotator: str) -> Work:
        """What ``annotator`` has done, and all that may still be asked, in an order of the annotator's own.

        A question is asked until it has the votes that are wanted, those of annotators who failed not counted; a
        check is put to everyone.
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
        """Every vote, in the order of their times."""
        with self._lock:
            rows = self._db.execute("SELECT annotator, item, question, answer, at FROM votes ORDER BY at, rowid")
            return [Vote(*row) for row in rows]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _counts(self) -> dict[tuple[str, str], int]:
        """Votes on each item and question, without those of annotators who failed the checks."""
        rows = self._db.execute(
            f"SELECT item, question, count(*) FROM votes WHERE annotator NOT IN ({_FAILED}) GROUP BY item, question",
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
    """All items shuffled for this annotator, the checks spread evenly among the pairs."""
    random = numpy_generator(int(study.sha256[:15], 16), "human-study", "order", annotator)
    pairs = [study.pairs[place] for place in random.permutation(len(study.pairs))]
    checks = [study.checks[place] for place in random.permutation(len(study.checks))]
    places = [(place + 0.5) / len(pairs) for place in range(len(pairs))]
    places += [(place + random.random()) / len(checks) for place in range(len(checks))]
    return [item for _, item in sorted(zip(places, [*pairs, *checks], strict=True), key=lambda entry: entry[0])]
