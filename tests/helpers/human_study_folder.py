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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    def get(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        return send(urllib.request.Request(self.url + path))

    def post(self, body: bytes, kind: str = "application/json", path: str = "api/vote") -> tuple[int, dict[str, Any]]:
        status, answer, _ = send(urllib.request.Request(self.url + path, data=body, headers={"Content-Type": kind}))
        return status, json.loads(answer)

    def vote(self, annotator: str, item: str, question: str, answer: str) -> tuple[int, dict[str, Any]]:
        vote = {"annotator": annotator, "item": item, "question": question, "answer": answer}
        return self.post(json.dumps(vote).encode())

    def next(self, annotator: str) -> dict[str, Any]:
        status, answer, _ = self.get(f"api/next?annotator={quote(annotator)}")
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
def serving(folder: Path, port: int = 0) -> Iterator[Served]:
    """Run ``dalle human-study serve`` in another process, killed at the end."""
    process = subprocess.Popen(
        [DALLE, "human-study", "serve", str(folder), "--port", str(port)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "the server did not start within 60 s"
        yield Served(process, process.stdout.readline().strip())
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
