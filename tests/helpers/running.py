"""Running a command in its own process, the smallest recipe, and a chain of the outputs of all stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DALLE = str(Path(sys.executable).with_name("dalle"))
# Helpers that run as programs of their own import other helpers.
_IMPORTS = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "TERM": "dumb",
    "PYTHONPATH": os.pathsep.join(_IMPORTS),
}


@dataclass(frozen=True)
class Done:
    """The result of a command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of stdout, which has nothing else."""
        return [json.loads(line) for line in self.out.splitlines()]

    def mistake(self) -> str:
        """Return the one line on stderr about a user's mistake; check for exit code 2 and no traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("dalle: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0])
        return lines[0]


def run(*arguments: object, stdin: str | None = None, timeout: float = 120) -> Done:
    """Run the installed command in its own process."""
    done = subprocess.run(
        [DALLE, *map(str, arguments)],
        input=stdin or "",
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def smallest_recipe(run_folder: Path, train: Path | None) -> dict[str, Any]:
    """Return a recipe whose stages take a second each: 32-pixel pictures, 4 x 4 tokens of 16, 12 updates."""
    training = {"updates": 12, "batch_size": 4, "workers": 0, "log_every": 1, "save_every": 4, "validation_samples": 8}
    return {
        "name": "smallest",
        "run": str(run_folder),
        "threads": 1,
        "image_size": 32,
        "data": {"train": None if train is None else str(train), "holdout": 0.2},
        "tokenizer": {"vocab_size": 400, "text_length": 48},
        "dvae": {
            "model": {"n_hid": 8, "n_init": 4, "codebook_size": 16, "codebook_std": 0.5},
            # The end of the cosine is set, so that a run may be extended.
            "learning_rate": {"peak": 1e-4, "final": 1.25e-6, "decay_updates": 1_200_000},
            "training": training,
        },
        "prior": {
            "model": {"layers": 3, "heads": 2, "d_head": 8, "d_model": 16, "grid": 4},
            "training": training,
        },
        "clip": {
            "model": {"embed_dim": 8, "patch_size": 8, "vision_width": 8, "vision_layers": 1, "text_width": 8,
                      "text_layers": 1, "head_width": 8},
            "training": training,
        },
        "sampling": {"n": 4},
    }  # fmt: skip


def write_recipe(folder: Path, settings: dict[str, Any], name: str = "smallest.yaml") -> Path:
    """Write ``settings`` to a recipe file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(yaml.safe_dump(settings))
    return file


@dataclass
class Chain:
    """The outputs of every stage, each at a path given on the command line."""

    root: Path
    recipe: Path
    stages: dict[str, Done] = field(default_factory=dict)

    @property
    def train(self) -> Path:
        return self.root / "shapes" / "train"

    @property
    def tokenizer(self) -> Path:
        return self.root / "made" / "tokenizer"

    @property
    def dvae(self) -> Path:
        return self.root / "made" / "dvae"

    @property
    def tokens(self) -> Path:
        return self.root / "made" / "tokens.zarr"

    @property
    def prior(self) -> Path:
        return self.root / "made" / "prior"

    @property
    def clip(self) -> Path:
        return self.root / "made" / "clip"
