"""Describe a run's folder for ``dalle show``: which stages are done, and which one comes next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.data.sample_lines import read_sample_lines
from dalle_cli.stores.checkpoint import Which, open_checkpoint, steps_in
from dalle_cli.stores.samples import prior_of
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
    drawn = [
        _file("sample", places.sample_lines),
        _file("rerank", places.ranked_lines),
        _file("report", places.root / "report.html"),
    ]
    if _drawn_by_another_prior(places):
        drawn = [
            stage if stage.state == "not run" else StageStatus(stage.command, "unfinished", "of an earlier prior")
            for stage in drawn
        ]
    yield from drawn


def _file(command: str, file: Path) -> StageStatus:
    return StageStatus(command, "done", str(file)) if file.is_file() else StageStatus(command, "not run")


def _part(command: str, store: Path, part: Part) -> StageStatus:
    state = TokenReader(store).parts.get(part) if (store / "zarr.json").is_file() else None
    if state is None:
        return StageStatus(command, "not run")
    return StageStatus(command, "done" if state.complete else "unfinished", f"{state.rows:,} rows")


def _drawn_by_another_prior(places: RunFolders) -> bool:
    """Return whether the run's prior has been trained further since its samples were drawn."""
    if not places.sample_lines.is_file() or not steps_in(places.prior):
        return False
    with places.sample_lines.open(encoding="utf-8") as lines:
        first = next(read_sample_lines(lines, str(places.sample_lines)), {})
    drawn_by = prior_of(Path(first["store"])) if "store" in first else None
    current: tuple[Which, ...] = ("best", "last")
    return drawn_by is not None and all(
        drawn_by != open_checkpoint(places.prior, which=each).identity for each in current
    )


def _trained(command: str, run: Path) -> StageStatus:
    if not run.is_dir() or not steps_in(run):
        return StageStatus(command, "not run")
    newest = open_checkpoint(run, which="last")
    updates = newest.updates()
    detail = f"update {newest.step:,} of {updates:,}"
    if newest.ended_early:
        return StageStatus(command, "done", f"{detail}, ended by patience")
    return StageStatus(command, "done" if newest.step >= updates else "unfinished", detail)
