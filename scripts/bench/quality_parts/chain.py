"""Our chain, trained by its commands within a budget of minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from dalle_cli.config.load import load_recipe
from dalle_cli.planning.budget import SHARES, UPDATES_SHARE
from dalle_cli.planning.new_recipe import updates_settings
from dalle_cli.stores.checkpoint import Kind
from quality_parts.datasets import DataSet

STAGES: dict[Kind, str] = {"dvae": "train-dvae", "prior": "train-prior", "clip": "train-clip"}
TRIAL_UPDATES = 40
"""Updates of the trial run that tells how fast a stage is."""


@dataclass
class Chain:
    """A run of the chain in the folder ``run``, with the settings of ``recipe`` and further ones, as KEY=VALUE."""

    recipe: Path
    data: DataSet
    run: Path
    seed: int
    changes: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each command so far."""

    def train(self, minutes: float) -> None:
        """Train every stage so that all of them together take ``minutes``; a finished chain is left alone."""
        done = self.run / "seconds.json"
        if done.is_file():
            self.seconds = json.loads(done.read_text())
            return
        left = 60 * minutes
        self._timed("train-tokenizer")
        self._timed("tokenize-text")
        left -= sum(self.seconds.values())
        for stage, command in STAGES.items():
            later = sum(
                share for name, share in SHARES.items() if list(SHARES).index(name) >= list(SHARES).index(stage)
            )
            began = time.perf_counter()
            self._set_updates(stage, command, left * SHARES[stage] / later)
            self._timed(command)
            if stage == "dvae":
                self._timed("encode-images")
            left -= time.perf_counter() - began
        done.write_text(json.dumps(self.seconds))

    def _timed(self, command: str) -> None:
        began = time.perf_counter()
        run_dalle(command, str(self.recipe), *self._options())
        self.seconds[command] = time.perf_counter() - began

    def _options(self) -> list[str]:
        settings = [f"run={self.run}", f"seed={self.seed}", f"data.train={self.data.train}", *self.changes]
        return [word for setting in settings for word in ("--set", setting)]

    def _set_updates(self, stage: Kind, command: str, seconds: float) -> None:
        """Choose the stage's number of updates, and stretch its schedules alike, to take ``seconds``."""
        updates = max(100, int(self._rate(stage, command) * UPDATES_SHARE * seconds))
        settings = updates_settings({stage: updates}, load_recipe(self.recipe, self.changes))
        self.changes += [f"{key}={value}" for key, value in settings.items()]

    def _rate(self, stage: str, command: str) -> float:
        """Return the updates a second of a trial run, without its start."""
        with tempfile.TemporaryDirectory() as folder:
            trial = [f"{stage}.training.updates={TRIAL_UPDATES}", f"{stage}.training.log_every={TRIAL_UPDATES // 2}"]
            options = [word for setting in trial for word in ("--set", setting)]
            run_dalle(command, str(self.recipe), *self._options(), *options, "--out", folder)
            lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        times = [(line["step"], line["seconds"]) for line in lines if "seconds" in line]
        (first, began), (last, ended) = times[-2:]
        return (last - first) / (ended - began)


def run_dalle(*arguments: str, stdout: Path | None = None) -> None:
    """Run a command of dalle in a process of its own; its output goes into the file ``stdout``, or nowhere."""
    print("$ dalle", *arguments, file=sys.stderr, flush=True)
    with open(stdout or os.devnull, "w") as printed:
        subprocess.run([sys.executable, "-m", "dalle_cli", *arguments], stdout=printed, check=True)
