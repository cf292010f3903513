"""Where the stages of a recipe leave their outputs, and where the next stage looks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HEIGHT = 4
"""How far above an artifact its run's folder is looked for: RUN/samples/<request>/<picture> is three."""


@dataclass(frozen=True)
class RunFolders:
    """The folder of one chain, ``run:`` in its recipe."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def dvae(self) -> Path:
        return self.root / "dvae"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens.zarr"

    @property
    def prior(self) -> Path:
        return self.root / "prior"

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def samples(self) -> Path:
        return self.root / "samples"


def run_of(artifact: Path) -> RunFolders:
    """The chain that ``artifact`` (a stage's folder, a checkpoint in it, or a file below) lies in.

    It is the nearest folder above that holds the outputs of two stages or more, and else the artifact's own parent.
    """
    for parent in list(artifact.resolve().parents)[:_HEIGHT]:
        folders = RunFolders(parent)
        if sum(p.exists() for p in (folders.tokenizer, folders.dvae, folders.prior, folders.clip)) >= 2:
            return folders
    return RunFolders(artifact.resolve().parent)
