"""A small study for the tests of dalle human-study, its server in another process, and requests to it."""

from __future__ import annotations

import json
import select
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.human_study.make import StudyRequest, make_study
from dalle_cli.human_study.study import Study
from helpers.running import DALLE, ENVIRONMENT

SIZE = 32


def write_pictures(folder: Path, names: list[str], seed: int, size: int = SIZE) -> dict[str, np.ndarray]:
    """Write random pictures, all different, as folder/NAME.png."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    pictures = {name: random.integers(0, 256, (size, size, 3), np.uint8) for name in names}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return pictures


def small_study(root: Path, pairs: int = 6, **settings: Any) -> tuple[Path, Study]:
    """Make a study of the systems ``mine`` and ``theirs``, with pictures named by the captions' line numbers."""
    names = [str(number) for number in range(1, pairs + 1)]
    captions = root / "captions.txt"
    for seed, system in enumerate(("mine", "theirs")):
        write_pictures(root / system, names, seed)
    captions.write_text("".join(f"caption number {name}\n" for name in names))
    request = StudyRequest(
        {"mine": str(root / "mine"), "theirs": str(root / "theirs")}, captions, **{"image_size": SIZE, **settings}
    )
    return root / "study", make_study(request, root / "study")


@dataclass
class Served:
    """A running server, and the links that it printed, by the annotators' names."""

    process: subprocess.Popen[str]
    links: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return next(iter(self.links.values())).partition("#")[0]

    def code(self, annotator: str) -> dict[str, str]:
        """Return the header that lets an annotator vote."""
        return {"Authorization": f"Bearer {self.links[annotator].partition('#')[2]}"}

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
        return send(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(self, body: bytes, headers: dict[str, str], path: str = "api/vote") -> tuple[int, dict[str, Any]]:
        whole = {"Content-Type": "application/json", **headers}
        status, answer, _ = send(urllib.request.Request(self.url + path, data=body, headers=whole))
        return status, json.loads(answer)

    def vote(self, annotator: str, item: str, question: str, answer: str) -> tuple[int, dict[str, Any]]:
        vote = {"item": item, "question": question, "answer": answer}
        return self.post(json.dumps(vote).encode(), self.code(annotator))

    def next(self, annotator: str) -> dict[str, Any]:
        status, answer, _ = self.get("api/next", self.code(annotator))
        assert status == 200, answer
        found: dict[str, Any] = json.loads(answer)
        return found


def send(request: urllib.request.Request) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers, also of an answer that refuses the request."""
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@contextmanager
def serving(folder: Path, port: int = 0, links: int = 8, name: str = "localhost") -> Iterator[Served]:
    """Run ``dalle human-study serve`` in another process, killed at the end."""
    process = subprocess.Popen(
        [DALLE, "human-study", "serve", str(folder), "--port", str(port), "--links", str(links), "--name", name],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "the server did not start within 60 s"
        yield Served(process, dict(process.stdout.readline().rstrip().split("\t") for _ in range(links)))
    finally:
        process.kill()
        process.wait()


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until ``true()``; fail if that takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)


Stored = dict[tuple[str, str, str], str]


def stored(folder: Path) -> Stored:
    """Return every vote in the database, read by SQLite alone."""
    with sqlite3.connect(folder / "votes.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = db.execute("SELECT annotator, item, question, answer FROM votes").fetchall()
    db.close()
    return {(annotator, item, question): answer for annotator, item, question, answer in rows}
