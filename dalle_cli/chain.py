"""The chain: the stages of a recipe in order, each a command of dalle in a process of its own.

A stage that is done ends at once, and one that was killed resumes, so the chain needs no record of its own. Imports
nothing heavy.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO, Literal, get_args

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.distributed.spawn import describe_exit, end_with_parent
from dalle_cli.errors import RESUMABLE, STOP_SIGNALS, UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import owned, rename_synced

if TYPE_CHECKING:
    from dalle_cli.config.schema import Recipe

StageName = Literal[
    "train-tokenizer",
    "tokenize-text",
    "train-dvae",
    "encode-images",
    "train-prior",
    "train-clip",
    "sample",
    "rerank",
    "report",
]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
WITH_RECIPE = STAGE_NAMES[: STAGE_NAMES.index("sample")]
"""Stages whose first argument is the recipe, and which record their command in the run."""
HELD_OUT_CAPTIONS = 50
"""Number of held-out captions that the chain draws by default."""
IN_CHAIN = "DALLE_IN_CHAIN"
"""Environment variable of a stage that ``dalle run`` started."""


@dataclass(frozen=True)
class Stage:
    """A stage's command and its arguments."""

    name: StageName
    arguments: tuple[str, ...]
    output: Path | None = None
    """The file that takes what the command prints on stdout."""
    made: Path | None = None
    """A file that shows that the stage is done, for a command that would begin again."""

    @property
    def line(self) -> str:
        """The command as a line for the shell."""
        words = shlex.join(("dalle", self.name, *self.arguments))
        return words if self.output is None else f"{words} > {shlex.quote(str(self.output))}"


def stages_of(file: Path, recipe: Recipe, changes: Sequence[str], captions: int, gpus: int | None) -> list[Stage]:
    """Return all stages of the recipe in ``file`` with ``changes`` (KEY=VALUE), drawing ``captions`` held-out captions.

    ``gpus`` is the number of processes that train the dVAE and the prior; None: one.
    """
    places = RunFolders(Path(recipe.run))
    samples, ranked = places.sample_lines, places.ranked_lines
    settings = (str(file), *(word for change in changes for word in ("--set", change)))
    ranks = () if gpus is None else ("--gpus", str(gpus))
    return [
        Stage("train-tokenizer", settings, made=places.tokenizer / "tokenizer.json"),
        Stage("tokenize-text", settings),
        Stage("train-dvae", settings + ranks),
        Stage("encode-images", settings),
        Stage("train-prior", settings + ranks),
        Stage("train-clip", settings),
        Stage("sample", (str(places.prior), "--held-out", "--limit", str(captions)), output=samples),
        Stage("rerank", (str(samples),), output=ranked),
        Stage("report", (*settings, "--ranked", str(ranked))),
    ]


def log_next(done: StageName, file: Path, recipe: Recipe, changes: Sequence[str]) -> None:
    """Log the command that comes next in the recipe's run, unless ``dalle run`` started ``done`` and starts that too.

    Nothing is logged if the run lacks the output of ``done``: it is not whole yet, or lies elsewhere.
    """
    from dalle_cli.views.describe_run import describe_run

    if IN_CHAIN in os.environ:
        return
    with suppress(UserError):  # the output of another stage is damaged, which its readers will say
        found = describe_run(Path(recipe.run))
        states = {stage.command: stage.state for stage in found.stages} if found else {}
        nothing_to_draw = found is not None and found.next == "sample" and not recipe.data.holds_out
        if found is not None and found.next is not None and states[done] == "done" and not nothing_to_draw:
            stages = stages_of(file, recipe, changes, HELD_OUT_CAPTIONS, None)
            log(f"next: {next(stage.line for stage in stages if stage.name == found.next)}")


def next_line(run: Path, stage: str) -> str:
    """Return the command of a run's next stage, with the recipe and the changes of the last command recorded in it.

    If none is recorded, RECIPE stands in its place.
    """
    from dalle_cli.config.schema import Recipe
    from dalle_cli.stores.provenance import read_commands

    file, changes = "RECIPE", list[str]()
    for line in reversed(read_commands(run)):
        words = shlex.split(line["command"])
        if len(words) > 2 and words[1] in WITH_RECIPE and not words[2].startswith("-"):
            given = list(pairwise(words))
            changes = [value for option, value in given if option == "--set"]
            file, changes = words[2], changes + [f"data.train={value}" for option, value in given if option == "--data"]
            break
    stages = stages_of(Path(file), Recipe(run=str(run)), changes, HELD_OUT_CAPTIONS, None)
    return next(each.line for each in stages if each.name == stage)


def run_stages(stages: Sequence[Stage]) -> None:
    """Run stages one after another; stdout gets what the last one prints, if it has no file for it.

    SIGTERM and SIGUSR1 are forwarded to the stage that runs, where training saves a checkpoint, and no other stage
    begins. No stage outlives this process, even if it is killed.

    Raises:
        SystemExit: a stage failed, and its exit code is passed on; or a signal stopped the chain (RESUMABLE).
        UserError: another process ended a stage by a signal.
    """
    with _forwarded_stops() as stops:
        for number, stage in enumerate(stages, start=1):
            if stops.received:
                log(f"stopped before {stage.name}; exit code {RESUMABLE}; run the same command again to go on")
                raise SystemExit(RESUMABLE)
            if stage.made is not None and stage.made.exists():
                log(f"== {number} of {len(stages)}: {stage.name} is done: {stage.made}")
                continue
            log(f"== {number} of {len(stages)}: {stage.line}")
            began = time.monotonic()
            code = _run(stage, stops, last=number == len(stages))
            if (code < 0 or code > 128) and stops.received:
                log(f"stopped within {stage.name}; exit code {RESUMABLE}; run the same command again to go on")
                raise SystemExit(RESUMABLE)
            if code < 0:
                raise UserError(f"{stage.name} {describe_exit(code)}; run the same command again to resume")
            if code:
                raise SystemExit(code)
            log(f"   {time.monotonic() - began:.0f} s")


@dataclass
class _Stops:
    """Stop signals that the chain received, and the process of the stage that runs, if one does."""

    received: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def forward(self, which: int, _: FrameType | None) -> None:
        self.received.append(which)
        if self.process is not None:
            self.process.send_signal(which)


@contextmanager
def _forwarded_stops() -> Iterator[_Stops]:
    """Forward stop signals to the stage that runs; they stay ignored once one ended the chain, as in training."""
    stops = _Stops()
    handlers = {which: signal.signal(which, stops.forward) for which in STOP_SIGNALS}
    try:
        yield stops
    finally:
        for which, handler in handlers.items():
            signal.signal(which, signal.SIG_IGN if stops.received else handler)


def _run(stage: Stage, stops: _Stops, *, last: bool) -> int:
    """Run a stage and return its exit code; its output takes its place only if it succeeds."""
    if stage.output is None:
        return _run_into(None, stage, stops, last=last)
    unfinished = stage.output.with_name(f"{stage.output.name}.tmp")
    with owned(stage.output):
        code = _run_into(unfinished, stage, stops, last=last)
        if code == 0:
            rename_synced(unfinished, stage.output)
    return code


def _run_into(file: Path | None, stage: Stage, stops: _Stops, *, last: bool) -> int:
    """Run a stage, whose stdout goes to ``file`` if it has one, and return its exit code."""
    with _stdout_of(file, last) as stdout:
        program = [sys.executable, "-m", "dalle_cli", stage.name, *stage.arguments]
        environment = os.environ | {IN_CHAIN: "1"}
        process = subprocess.Popen(program, stdout=stdout, env=environment, preexec_fn=end_with_parent)
        stops.process = process
        try:
            if stops.received:  # it came while the process was starting
                process.send_signal(stops.received[-1])
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the stage too, which ends by itself
            process.wait()
            raise
        finally:
            stops.process = None
    return code


@contextmanager
def _stdout_of(file: Path | None, last: bool) -> Iterator[BinaryIO | None]:
    """Open what a stage's stdout goes to: its file, stderr, or for the last stage the stdout of this process."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            yield opened
    else:
        yield None if last else sys.stderr.buffer
