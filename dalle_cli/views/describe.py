"""Describe an artifact for ``dalle show``: a recipe, token store, sample store, checkpoint, tokenizer or run."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.shipped import shipped_recipe
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.places import Place
from dalle_cli.stores.samples import STORE, read_attributes
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.typed import explain_damage
from dalle_cli.stores.usable_rows import known_usable_rows
from dalle_cli.training.validation import validation_warnings
from dalle_cli.views.describe_recipe import RecipeDescription, describe_recipe
from dalle_cli.views.describe_run import RunDescription, describe_run

UNDERSTOOD = (
    "dalle show understands a recipe (.yaml), the folder of a run, a token store, a sample store or its folder, a "
    "checkpoint or the folder it lies in, and a tokenizer (tokenizer.json or its folder)"
)
CAPTION_EXAMPLES = 5
TOKEN_EXAMPLES = 24
BYTE_TOKENS = 256
"""Number of single-byte tokens of a byte-level BPE, which have the first ids."""


@dataclass(frozen=True)
class ArrayDescription:
    """An array of a store; ``bytes`` counts its files, and is None if they are on a server and were not counted."""

    shape: list[int]
    dtype: str
    bytes: int | None


@dataclass(frozen=True)
class PartDescription:
    """The text or the image part of a token store, and the settings and hashes it was made with."""

    rows: int
    complete: bool
    made_with: dict[str, Any]


@dataclass(frozen=True)
class CaptionExample:
    """A caption of a token store and its number of tokens."""

    row: int
    tokens: int
    caption: str


@dataclass(frozen=True)
class TokenStoreDescription:
    """A token store: its parts, their origin, the skipped rows, and the first captions."""

    what: str = field(default="token store", init=False)
    path: str
    rows: int
    usable_rows: int | None
    """Number of rows with a caption and an image; None until both parts exist, and until a large store is complete."""
    complete: bool
    parts: dict[str, PartDescription]
    source: str | list[str] | None
    """Source of both parts, or both sources if they differ."""
    tokenizer: str | None
    dvae: str | None
    skipped: dict[str, dict[str, int]]
    """Number of skipped rows for each reason, by part."""
    arrays: dict[str, ArrayDescription]
    bytes: int | None
    captions: list[CaptionExample]


@dataclass(frozen=True)
class SampleStoreDescription:
    """A sample store: its prompts, the number of samples, and their settings."""

    what: str = field(default="sample store", init=False)
    path: str
    rows: int
    committed: int
    complete: bool
    samples_a_prompt: int
    prompts: list[str]
    seed: int
    settings: dict[str, Any]
    prior: str
    arrays: dict[str, ArrayDescription]


@dataclass(frozen=True)
class FileDescription:
    """A file of a checkpoint; ``bytes`` is None if it is missing, ``sha256`` None if the manifest has none."""

    bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class CheckpointDescription:
    """A checkpoint: its update, its files, and the hashes of the artifacts it belongs to."""

    what: str = field(default="checkpoint", init=False)
    path: str
    kind: str
    step: int
    updates: int
    identity: str
    parameters: int | None
    recipe: str
    belongs: dict[str, str]
    metrics: dict[str, float]
    files: dict[str, FileDescription]
    checkpoints_in_run: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class TokenizerDescription:
    """A tokenizer; ``examples`` maps token ids, as strings, to the tokens' text."""

    what: str = field(default="tokenizer", init=False)
    path: str
    vocab_size: int
    sha256: str
    examples: dict[str, str]


Description = (
    RecipeDescription
    | TokenStoreDescription
    | SampleStoreDescription
    | CheckpointDescription
    | TokenizerDescription
    | RunDescription
)


def describe(path: Place, overrides: Sequence[str] = ()) -> Description:
    """Describe a recipe (with the settings of ``--set``) or an artifact; ``asdict`` of the result is JSON.

    On a server, only a token store can be described.

    Raises:
        UserError: ``path`` is of none of the kinds listed in ``UNDERSTOOD``, or is damaged.
    """
    if isinstance(path, Path) and (
        path.suffix in (".yaml", ".yml") or (not path.exists() and shipped_recipe(str(path)) is not None)
    ):
        return describe_recipe(load_recipe(path, overrides))
    if overrides:
        raise UserError(f"{path}: --set changes a recipe, and this is none; leave it out")
    if not isinstance(path, Path):
        return _describe_tokens(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {UNDERSTOOD}")
    if (path / "zarr.json").is_file():
        return _describe_store(path)
    if (path / STORE / "zarr.json").is_file():
        return _describe_samples(path / STORE)
    if (path / "manifest.json").is_file() or (path.is_dir() and steps_in(path)):
        return _describe_checkpoint(path)
    if path.name == "tokenizer.json" or (path / "tokenizer.json").is_file():
        return _describe_tokenizer(path)
    if path.is_dir() and (run := describe_run(path)) is not None:
        return run
    if path.is_dir() and (runs := sorted(str(p) for p in path.iterdir() if p.is_dir() and RunFolders(p).begun)):
        raise UserError(f"{path}: is a folder of runs; name one of {', '.join(runs)}")
    raise UserError(f"{path}: is not an artifact of dalle; {UNDERSTOOD}")


def _describe_store(path: Path) -> Description:
    import zarr

    try:
        group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
    except Exception as error:  # an array instead of a group, or metadata that is not JSON
        raise UserError(f"{path}: cannot be read as a Zarr group ({error}); {UNDERSTOOD}") from None
    kind = group.attrs.get("format")
    if kind == "dalle-samples":
        return _describe_samples(path)
    if kind != "dalle-tokens":
        raise UserError(f"{path}: is a Zarr group of another program; {UNDERSTOOD}")
    return _describe_tokens(path)


def _describe_tokens(path: Place) -> TokenStoreDescription:
    reader = TokenReader(path)
    parts = reader.parts
    arrays = _arrays(path, reader.arrays, _counted_bytes(reader))
    sizes = [array.bytes for array in arrays.values()]
    usable = known_usable_rows(reader) if len(parts) == 2 else None
    captions: list[CaptionExample] = []
    if "text" in parts and parts["text"].rows:
        rows = range(min(CAPTION_EXAMPLES, parts["text"].rows))
        lengths = reader.read("text_length", np.array(rows, dtype=np.int64))
        captions = [
            CaptionExample(row, int(length), caption)
            for row, length, caption in zip(rows, lengths, reader.strings("caption", rows), strict=True)
        ]
    sources = {str(state.identity["source_name"]) for state in parts.values()}
    return TokenStoreDescription(
        path=str(path),
        rows=len(reader) if parts else 0,
        usable_rows=None if usable is None else len(usable),
        complete=len(parts) == 2 and all(state.complete for state in parts.values()),
        parts={part: PartDescription(state.rows, state.complete, state.identity) for part, state in parts.items()},
        source=sources.pop() if len(sources) == 1 else sorted(sources) or None,
        tokenizer=parts["text"].identity.get("tokenizer") if "text" in parts else None,
        dvae=parts["image"].identity.get("dvae") if "image" in parts else None,
        skipped={part: state.skipped for part, state in parts.items()},
        arrays=arrays,
        bytes=None if None in sizes else sum(size or 0 for size in sizes),
        captions=captions,
    )


def _describe_samples(path: Path) -> SampleStoreDescription:
    import zarr

    with explain_damage(path):
        group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
        found, total = read_attributes(group, path), int(group["tokens"].shape[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns of files that are not its own
            arrays = dict(sorted(group.arrays()))
        return SampleStoreDescription(
            path=str(path),
            rows=total,
            committed=found.rows,
            complete=found.rows == total,
            samples_a_prompt=found.request.n,
            prompts=found.request.prompts,
            seed=found.request.seed,
            settings=found.request.settings,
            prior=found.request.prior,
            arrays=_arrays(path, arrays, {}),
        )


def _counted_bytes(reader: TokenReader) -> dict[str, int]:
    """Return the size of each array's shard files as its writers counted it; none for a store of an earlier version."""
    found: dict[str, int] = {}
    states = list(reader.parts.values())
    for state in states:
        if state.bytes is None:
            return {}
        for name, size in state.bytes.items():
            found[name] = max(size, found.get(name, 0))  # both parts count the keys
    if not any(state.complete for state in states):
        found.pop("key", None)  # unfinished shares of the parts may hold different rows
    return found


def _arrays(path: Place, arrays: Mapping[str, Any], counted: Mapping[str, int]) -> dict[str, ArrayDescription]:
    """Describe the arrays; the files of those whose size was not ``counted`` are looked at one by one, if here."""

    def size(name: str) -> int | None:
        folder = path / name
        if name in counted:
            return counted[name] + len((folder / "zarr.json").read_bytes())
        if not isinstance(folder, Path):
            return None
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    return {
        name: ArrayDescription(
            shape=list(array.shape),
            dtype="string" if array.dtype.kind not in "biuf" else str(array.dtype),
            bytes=size(name),
        )
        for name, array in arrays.items()
    }


def _describe_checkpoint(path: Path) -> CheckpointDescription:
    checkpoint = open_checkpoint(path)
    recipe = checkpoint.recipe()
    run = checkpoint.path.parent if checkpoint.path.name.startswith("step-") else None
    files = [*checkpoint.files, "recipe.yaml", "trainer/optimizer.safetensors", "trainer/state.json"]
    return CheckpointDescription(
        path=str(checkpoint.path),
        kind=checkpoint.kind,
        step=checkpoint.step,
        updates=checkpoint.updates(),
        identity=checkpoint.identity,
        parameters=_count_parameters(checkpoint.path / "ema.safetensors"),
        recipe=recipe.name,
        belongs=dict(checkpoint.belongs),
        metrics=dict(checkpoint.metrics),
        files={name: FileDescription(_size(checkpoint.path / name), checkpoint.files.get(name)) for name in files},
        checkpoints_in_run=[folder.name for folder in steps_in(run)] if run else [],
        warnings=validation_warnings(open_checkpoint(run, which="last") if run else checkpoint),
    )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _count_parameters(file: Path) -> int | None:
    """Count the values of a safetensors file from its header; None if there is no such file."""
    if not file.is_file():
        return None
    with explain_damage(file), file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(stream.read(length))
        return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


def _describe_tokenizer(path: Path) -> TokenizerDescription:
    from dalle_cli.text.bpe import Tokenizer

    tokenizer = Tokenizer.load(path)
    size = tokenizer.vocab_size
    first = BYTE_TOKENS if size > BYTE_TOKENS + 1 else 0
    ids = sorted({round(first + i * (size - 1 - first) / (TOKEN_EXAMPLES - 1)) for i in range(TOKEN_EXAMPLES)})
    return TokenizerDescription(
        path=tokenizer.name,
        vocab_size=size,
        sha256=tokenizer.identity,
        examples={str(i): tokenizer.decode([i]) for i in ids},
    )
