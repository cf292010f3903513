"""What the stages of a recipe have left in its run, for the report: what is there, and what is not and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import Checkpoint, Kind, open_checkpoint
from dalle_cli.stores.provenance import commands_of, read_commands
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import Tokenizer

KINDS: tuple[Kind, ...] = ("dvae", "prior", "clip")
NAMES: dict[Kind, str] = {"dvae": "dVAE", "prior": "prior", "clip": "CLIP"}


@dataclass
class Chain:
    """The artifacts of one run. ``missing`` has one line for each that is absent or cannot be read."""

    recipe: Recipe
    places: RunFolders
    tokenizer: Tokenizer | None = None
    reader: TokenReader | None = None
    checkpoints: dict[Kind, Checkpoint] = field(default_factory=dict)
    source: Source | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return self.tokenizer is None and self.reader is None and not self.checkpoints

    @property
    def identities(self) -> dict[str, str]:
        """Hash of each artifact present that others may belong to."""
        own: dict[str, str] = {kind: checkpoint.identity for kind, checkpoint in self.checkpoints.items()}
        if self.tokenizer is not None:
            own["tokenizer"] = self.tokenizer.identity
        return own

    def metrics(self, kind: Kind) -> list[dict[str, Any]]:
        """The lines of a stage's metrics.jsonl; a line that a killed run left half-written is passed over."""
        file = {"dvae": self.places.dvae, "prior": self.places.prior, "clip": self.places.clip}[kind] / "metrics.jsonl"
        lines = []
        for text in file.read_text().splitlines() if file.is_file() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines

    def artifacts(self, requests: Mapping[Path, dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each artifact: ``artifact``, ``path`` (relative to the run), ``step``, ``sha256``, ``belongs``."""
        rows = []
        if self.tokenizer is not None:
            rows.append(self._row("tokenizer", Path(self.tokenizer.name), sha256=self.tokenizer.identity))
        if self.reader is not None:
            parts: tuple[tuple[Any, str], ...] = (("text", "tokenizer"), ("image", "dvae"))
            made_with = {
                role: self.reader.part(part)["identity"][role] for part, role in parts if part in self.reader.attributes
            }
            rows.append(self._row("token store", self.reader.path, belongs=made_with))
        for kind, checkpoint in self.checkpoints.items():
            row = self._row(NAMES[kind], checkpoint.path, checkpoint.step, checkpoint.identity, checkpoint.belongs)
            rows.append(row | {"recipe": checkpoint.recipe().name})
        for store, request in requests.items():
            rows.append(self._row("samples", store, belongs={"prior": str(request["prior"])}))
        return rows

    def samples(self, requests: Mapping[Path, dict[str, Any]]) -> list[dict[str, Any]]:
        """How the samples of each store were drawn."""
        return [
            {
                "path": os.path.relpath(store, self.places.root),
                "captions": len(request["prompts"]),
                "seed": request["seed"],
                "settings": {name: value for name, value in request["settings"].items() if value is not None},
            }
            for store, request in requests.items()
        ]

    def commands(self) -> list[dict[str, Any]]:
        """The commands that made the training pictures and what is in the run, as far as journals name them, in the
        order in which they finished: of those that made the same artifact by the same command the last.
        """
        found: dict[tuple[str, str], dict[str, Any]] = {}
        # A source is made whole, its splits in it.
        pictures = [] if self.source is None else [Path(self.source.name).parent, Path(self.source.name)]
        lines = [line for made in pictures for line in commands_of(made)]
        for line in [*lines, *read_commands(self.places.root)]:
            found.pop((line["artifact"], line["command"]), None)
            found[line["artifact"], line["command"]] = line
        return list(found.values())

    def _row(
        self,
        artifact: str,
        path: Path,
        step: int | None = None,
        sha256: str | None = None,
        belongs: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        own = self.identities
        return {
            "artifact": artifact,
            "path": os.path.relpath(path, self.places.root),
            "step": step,
            "sha256": sha256,
            "belongs": [
                {"role": role, "sha256": digest, "in_this_run": own[role] == digest if role in own else None}
                for role, digest in (belongs or {}).items()
            ],
        }


def read_chain(recipe: Recipe) -> Chain:
    """Open what there is in the recipe's run; never fails for what is missing or damaged, but says so."""
    chain = Chain(recipe, RunFolders(Path(recipe.run)))
    places = chain.places
    if not places.tokenizer.exists():
        chain.missing.append(f"no tokenizer in this run ({places.tokenizer})")
    else:
        try:
            chain.tokenizer = Tokenizer.load(places.tokenizer)
        except UserError as error:
            chain.missing.append(f"the tokenizer cannot be read: {error}")
    if not places.tokens.exists():
        chain.missing.append(f"no token store in this run ({places.tokens})")
    else:
        try:
            chain.reader = TokenReader(places.tokens)
        except UserError as error:
            chain.missing.append(f"the token store cannot be read: {error}")
    for kind, folder in zip(KINDS, (places.dvae, places.prior, places.clip), strict=True):
        if not folder.exists():
            chain.missing.append(f"no {NAMES[kind]} in this run ({folder})")
            continue
        try:
            chain.checkpoints[kind] = open_checkpoint(folder, kind)
        except UserError as error:
            chain.missing.append(f"the {NAMES[kind]} cannot be read: {error}")
    _open_source(chain)
    return chain


def _open_source(chain: Chain) -> None:
    """The pictures that the recipe names, or else those that the dVAE was trained on."""
    spec = chain.recipe.data.train
    if spec is None and "dvae" in chain.checkpoints:
        spec = chain.checkpoints["dvae"].recipe().data.train
    if spec is None:
        chain.missing.append("no training pictures: the recipe names none in data.train")
        return
    try:
        chain.source = open_source(spec)
    except UserError as error:
        chain.missing.append(f"the training pictures cannot be read: {error}")


def requests_of_samples(stores: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """What was asked of each store of samples that can be read."""
    found = ((store, _request_of_samples(store)) for store in stores)
    return {store: request for store, request in found if request is not None}


def _request_of_samples(store: Path) -> dict[str, Any] | None:
    import zarr

    try:
        request = dict(zarr.open_group(str(store), mode="r", zarr_format=3).attrs["request"])
        return request if {"prior", "prompts", "seed", "settings"} <= request.keys() else None
    except Exception:  # moved or deleted since: the samples' lines are what the report is about
        return None
