"""Open the artifacts of a run, and list them for its report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_sources
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import Checkpoint, Kind, open_checkpoint
from dalle_cli.stores.files import read_json_lines
from dalle_cli.stores.provenance import commands_of, read_commands
from dalle_cli.stores.samples import read_attributes
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import Tokenizer

NAMES: dict[Kind, str] = {"dvae": "dVAE", "prior": "prior", "clip": "CLIP"}


@dataclass(frozen=True)
class Reference:
    """Reference to an artifact that another one belongs to, by role and hash."""

    role: str
    sha256: str
    in_this_run: bool | None
    """True if the run has this artifact, False if it has another in the same role, None if it has none."""


@dataclass(frozen=True)
class ArtifactRow:
    """An artifact of a run; ``path`` is relative to the run's folder."""

    artifact: str
    path: str
    step: int | None
    sha256: str | None
    belongs: list[Reference]


@dataclass(frozen=True)
class CheckpointRow(ArtifactRow):
    """A checkpoint of a run, and its recipe's name."""

    recipe: str


@dataclass(frozen=True)
class StoreRequest:
    """The request recorded in a sample store."""

    store: Path
    prior: str
    """Hash of the prior."""
    prompts: int
    seed: int
    settings: dict[str, Any]


@dataclass
class Run:
    """The artifacts of a run; ``missing`` has a line for each one that is absent or unreadable."""

    recipe: Recipe
    folders: RunFolders
    tokenizer: Tokenizer | None = None
    tokens: TokenReader | None = None
    checkpoints: dict[Kind, Checkpoint] = field(default_factory=dict)
    source: Source | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """True if the run has no readable artifact."""
        return self.tokenizer is None and self.tokens is None and not self.checkpoints

    def metrics(self, kind: Kind) -> list[dict[str, Any]]:
        """Return the lines of a stage's metrics.jsonl, without incomplete lines of a killed run."""
        folder = {"dvae": self.folders.dvae, "prior": self.folders.prior, "clip": self.folders.clip}[kind]
        return [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]

    def artifacts(self, requests: Iterable[StoreRequest]) -> list[ArtifactRow]:
        """List the artifacts in the order of the pipeline, and last the sample stores of ``requests``."""
        rows = []
        if self.tokenizer is not None:
            identity = self.tokenizer.identity
            rows.append(ArtifactRow("tokenizer", self.relative(Path(self.tokenizer.name)), None, identity, []))
        if self.tokens is not None:
            parts: tuple[tuple[Any, str], ...] = (("text", "tokenizer"), ("image", "dvae"))
            made_with = {
                role: self.tokens.part(part).identity[role] for part, role in parts if part in self.tokens.parts
            }
            path = self.relative(Path(str(self.tokens.path)))
            rows.append(ArtifactRow("token store", path, None, None, self._references(made_with)))
        for kind, checkpoint in self.checkpoints.items():
            rows.append(
                CheckpointRow(
                    artifact=NAMES[kind],
                    path=self.relative(checkpoint.path),
                    step=checkpoint.step,
                    sha256=checkpoint.identity,
                    belongs=self._references(checkpoint.belongs),
                    recipe=checkpoint.recipe().name,
                )
            )
        for request in requests:
            belongs = self._references({"prior": request.prior})
            rows.append(ArtifactRow("samples", self.relative(request.store), None, None, belongs))
        return rows

    def commands(self) -> list[dict[str, Any]]:
        """Return the journal lines of the commands that made the training pictures and the run's artifacts.

        They are in the order in which the commands finished, with only the last of equal artifacts and commands, and
        without the folder of this machine that they ran in.
        """
        found: dict[tuple[str, str], dict[str, Any]] = {}
        # make-shapes records the folder of all its splits, other commands the source itself.
        pictures = [] if self.source is None else [Path(self.source.name).parent, Path(self.source.name)]
        lines = [line for made in pictures for line in commands_of(made)]
        for line in [*lines, *read_commands(self.folders.root)]:
            found.pop((line["artifact"], line["command"]), None)
            found[line["artifact"], line["command"]] = {key: line[key] for key in line if key != "folder"}
        return list(found.values())

    def relative(self, path: Path) -> str:
        """Return ``path`` relative to the run's folder."""
        return os.path.relpath(path, self.folders.root)

    def _references(self, belongs: Mapping[str, str]) -> list[Reference]:
        present: dict[str, str] = {kind: checkpoint.identity for kind, checkpoint in self.checkpoints.items()}
        if self.tokenizer is not None:
            present["tokenizer"] = self.tokenizer.identity
        if self.tokens is not None and "text" in self.tokens.parts:
            present["source"] = self.tokens.parts["text"].identity["source"]
        return [
            Reference(role, sha256, present[role] == sha256 if role in present else None)
            for role, sha256 in belongs.items()
        ]


def open_run(recipe: Recipe) -> Run:
    """Open the artifacts of the recipe's run; ``missing`` names those that are absent or damaged."""
    run = Run(recipe, RunFolders(Path(recipe.run)))
    folders = run.folders
    if not folders.tokenizer.exists():
        run.missing.append(f"no tokenizer in this run ({folders.tokenizer})")
    else:
        try:
            run.tokenizer = Tokenizer.load(folders.tokenizer)
        except UserError as error:
            run.missing.append(f"the tokenizer cannot be read: {error}")
    if not folders.tokens.exists():
        run.missing.append(f"no token store in this run ({folders.tokens})")
    else:
        try:
            run.tokens = TokenReader(folders.tokens)
        except UserError as error:
            run.missing.append(f"the token store cannot be read: {error}")
    for (kind, name), folder in zip(NAMES.items(), (folders.dvae, folders.prior, folders.clip), strict=True):
        if not folder.exists():
            run.missing.append(f"no {name} in this run ({folder})")
            continue
        try:
            run.checkpoints[kind] = open_checkpoint(folder, kind)
        except UserError as error:
            run.missing.append(f"the {name} cannot be read: {error}")
    _open_source(run)
    return run


def _open_source(run: Run) -> None:
    """Open the recipe's training pictures, or else the dVAE's."""
    specs = run.recipe.data.sources
    if not specs and "dvae" in run.checkpoints:
        specs = run.checkpoints["dvae"].recipe().data.sources
    if not specs:
        run.missing.append("no training pictures: the recipe names none in data.train")
        return
    try:
        run.source = open_sources(specs)
    except UserError as error:
        run.missing.append(f"the training pictures cannot be read: {error}")


def store_requests(stores: Iterable[Path]) -> list[StoreRequest]:
    """Return the request of each readable sample store."""
    found = (_store_request(store) for store in stores)
    return [request for request in found if request is not None]


def _store_request(store: Path) -> StoreRequest | None:
    import zarr

    try:
        request = read_attributes(zarr.open_group(str(store), mode="r", zarr_format=3), store).request
        settings = {name: value for name, value in request.settings.items() if value is not None}
        return StoreRequest(store, request.prior, len(request.prompts), request.seed, settings)
    except Exception:  # moved or deleted since; the report needs only the samples' lines
        return None
