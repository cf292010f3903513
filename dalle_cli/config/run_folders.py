"""Folders of a run: each stage leaves its output where the next stage looks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HEIGHT = 4
"""Number of folders above an artifact that may be its run's: RUN is three above RUN/samples/<request>/<picture>."""


@dataclass(frozen=True)
class RunFolders:
    """Folders inside ``root``, the folder that the key ``run`` of a recipe names."""

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

    @property
    def begun(self) -> bool:
        """True if the folder holds the output of a stage that trains or tokenizes."""
        return any(place.is_dir() for place in (self.tokenizer, self.tokens, self.dvae, self.prior, self.clip))

    @property
    def sample_lines(self) -> Path:
        """The file of what ``dalle sample`` printed, in a chain of all stages."""
        return self.root / "samples.jsonl"

    @property
    def ranked_lines(self) -> Path:
        """The file of what ``dalle rerank`` printed, in a chain of all stages."""
        return self.root / "ranked.jsonl"


def run_of(artifact: Path) -> RunFolders:
    """Return the run that an artifact belongs to: a stage's folder, a checkpoint in it, or a file below.

    The run is the nearest folder above with the outputs of at least two stages, or else the artifact's parent.
    """
    for parent in list(artifact.resolve().parents)[:_HEIGHT]:
        folders = RunFolders(parent)
        if sum(p.exists() for p in (folders.tokenizer, folders.dvae, folders.prior, folders.clip)) >= 2:
            return folders
    return RunFolders(artifact.resolve().parent)
