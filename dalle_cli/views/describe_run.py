"""Describe a run's folder for ``dalle show``: which stages are done, and which one comes next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.shards import Part
from dalle_cli.stores.tokens import TokenReader


@dataclass(frozen=True)
class StageStatus:
    """Progress of a stage of a run; ``detail`` says it in words, or names the file that the stage made."""

    command: str
    state: Literal["done", "unfinished", "not run"]
    detail: str = ""


@dataclass(frozen=True)
class RunDescription:
    """The stages of a run in order; ``next`` is the command of the first one that is not done, None if all are.

    ``line`` is that command with its arguments, where they are known.
    """

    what: str = field(default="run", init=False)
    path: str
    stages: list[StageStatus]
    next: str | None
    line: str | None = None


def describe_run(path: Path) -> RunDescription | None:
    """Describe the run in the folder ``path``; return None if it holds no stage's output.

    Raises:
        UserError: a store or checkpoint in it is damaged.
    """
    stages = list(_stages(RunFolders(path)))
    if all(stage.state == "not run" for stage in stages):
        return None
    return RunDescription(str(path), stages, next((stage.command for stage in stages if stage.state != "done"), None))


def _stages(places: RunFolders) -> Iterator[StageStatus]:
    yield _file("train-tokenizer", places.tokenizer / "tokenizer.json")
    yield _part("tokenize-text", places.tokens, "text")
    yield _trained("train-dvae", places.dvae)
    yield _part("encode-images", places.tokens, "image")
    yield _trained("train-prior", places.prior)
    yield _trained("train-clip", places.clip)
    yield _file("sample", places.sample_lines)
    yield _file("rerank", places.ranked_lines)
    yield _file("report", places.root / "report.html")


def _file(command: str, file: Path) -> StageStatus:
    return StageStatus(command, "done", str(file)) if file.is_file() else StageStatus(command, "not run")


def _part(command: str, store: Path, part: Part) -> StageStatus:
    state = TokenReader(store).parts.get(part) if (store / "zarr.json").is_file() else None
    if state is None:
        return StageStatus(command, "not run")
    return StageStatus(command, "done" if state.complete else "unfinished", f"{state.rows:,} rows")


def _trained(command: str, run: Path) -> StageStatus:
    if not run.is_dir() or not steps_in(run):
        return StageStatus(command, "not run")
    newest = open_checkpoint(run, which="last")
    updates = newest.updates()
    detail = f"update {newest.step:,} of {updates:,}"
    if newest.ended_early:
        return StageStatus(command, "done", f"{detail}, ended by patience")
    return StageStatus(command, "done" if newest.step >= updates else "unfinished", detail)
