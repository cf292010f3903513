"""Tokens of pairs on a web server, by commands that are killed and resumed, are those of the pairs on this machine."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.file_server import FileServer
from helpers.killed_runs import SMALL_SHARDS, files, kill
from helpers.pictures import noise
from helpers.running import DALLE, ENVIRONMENT, smallest_recipe, write_recipe
from helpers.untrained import make_untrained

from dalle_cli.config.load import load_recipe
from dalle_cli.stores.shards import Part
from dalle_cli.stores.tokens import TokenReader

SHARDS = 10


def make_pairs(folder: Path, pairs: int) -> Path:
    """Write tars of small pictures, of which 500 differ, and captions that all differ."""
    pictures = []
    for seed in range(500):
        file = io.BytesIO()
        noise(36, 32, seed).save(file, "JPEG")
        pictures.append(file.getvalue())
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * pairs // SHARDS, (shard + 1) * pairs // SHARDS):
                for extension, body in (
                    ("jpg", pictures[i % 500]),
                    ("txt", f"picture {i} of many, noise {i % 500}".encode()),
                ):
                    header = tarfile.TarInfo(f"{i:09d}.{extension}")
                    header.size = len(body)
                    tar.addfile(header, io.BytesIO(body))
    return folder


def rows(store: Path, part: Part) -> int:
    """Return the number of committed rows while the store is being written."""
    try:
        return TokenReader(store).part(part).rows
    except Exception:  # it is at its very beginning
        return 0


def without_name(store: Path) -> tuple[dict[str, str], Any]:
    """Return the hashes of a store's files and its attributes, but for the name of its source."""
    attributes = json.loads((store / "zarr.json").read_text())
    for part in ("text", "image"):
        attributes["attributes"][part]["identity"].pop("source_name")
    return files(store, "zarr.json", "checksums.json"), attributes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    server = FileServer(tmp_path / "served")
    yield server
    server.stop()


@pytest.mark.parametrize("pairs", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path: Path, server: FileServer, pairs: int, capsys: pytest.CaptureFixture[str]) -> None:
    make_pairs(tmp_path / "served", pairs)
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", None))
    made = make_untrained(load_recipe(recipe), tmp_path / "run")
    large = pairs > 50_000
    # A shard file has 4096 rows, of which a small source has none that is whole.
    program: Sequence[str] = (DALLE,) if large else (sys.executable, "-c", SMALL_SHARDS)
    stages: dict[Part, list[object]] = {
        "text": ["tokenize-text", recipe, "--tokenizer", made.tokenizer],
        "image": ["encode-images", recipe, "--dvae", made.dvae, "--set", f"dvae.training.workers={2 * large}"],
    }

    def finish(part: Part, data: object, store: Path) -> float:
        command = [*program, *map(str, stages[part]), "--data", str(data), "--tokens", str(store)]
        began = time.perf_counter()
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - began

    server.breaks_off = lambda number: number % 40 == 0
    local, killed = tmp_path / "local.zarr", tmp_path / "killed.zarr"

    def kill_amid(part: Part) -> tuple[int, int, float]:
        """Kill the stage after a fifth of its rows; return the rows, the requests before it and when it began.

        On busy cores a small stage can end between the question for its rows and the signal: then it begins again.
        """
        command = [*stages[part], "--data", server.url, "--tokens", killed]
        before_part = tmp_path / "before.zarr"
        if killed.exists():
            shutil.copytree(killed, before_part)
        for _ in range(10):
            before, began = len(server.requests), time.perf_counter()
            if kill(command, lambda: rows(killed, part) > pairs // 5, 0, program, 600):
                at = rows(killed, part)
                if 0 < at < pairs:
                    return at, before, began
            shutil.rmtree(killed)
            if before_part.exists():
                shutil.copytree(before_part, killed)
        raise AssertionError("the stage always ended before it was killed")

    took: dict[str, float] = {}
    for part in stages:
        took[f"{part}, local"] = finish(part, tmp_path / "served", local)
        at, before, began = kill_amid(part)
        finish(part, server.url, killed)
        took[f"{part}, killed at row {at}"] = time.perf_counter() - began
        assert len(server.requests) - before < pairs // 4
    assert without_name(killed) == without_name(local)
    assert TokenReader(local).part("image").skipped == {}
    with capsys.disabled():
        print(f"\n{pairs} pairs: " + "; ".join(f"{name}: {seconds:.1f} s" for name, seconds in took.items()))
