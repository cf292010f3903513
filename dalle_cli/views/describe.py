"""What ``dalle show`` says of a recipe, a token store, a sample store, a checkpoint or a tokenizer, as plain values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.samples import STORE
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.views.describe_recipe import describe_recipe

UNDERSTOOD = (
    "dalle show understands a recipe (.yaml), a token store, a sample store or its folder, a checkpoint or the run "
    "it lies in, and a tokenizer (tokenizer.json or its folder)"
)
CAPTIONS = 5
TOKEN_EXAMPLES = 24
BYTES = 256


def describe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything worth knowing of ``path``, with its kind under ``"what"``; JSON can hold all of it.

    ``overrides`` are ``--set``'s, for a recipe.

    Raises:
        UserError: ``path`` is nothing that is understood, or is damaged.
    """
    if path.suffix in (".yaml", ".yml"):
        return describe_recipe(load_recipe(path, overrides))
    if overrides:
        raise UserError(f"{path}: --set changes a recipe, and this is none; leave it out")
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
    places = RunFolders(path)
    stages = [p for p in (places.tokenizer, places.tokens, places.dvae, places.prior, places.clip) if p.exists()]
    if stages:
        raise UserError(f"{path}: is the folder of a whole chain; show one of {', '.join(str(p) for p in stages)}")
    raise UserError(f"{path}: nothing known; {UNDERSTOOD}")


def _describe_store(path: Path) -> dict[str, Any]:
    import zarr

    try:
        group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
    except Exception as error:  # a node that is no group, or metadata that is no JSON
        raise UserError(f"{path}: cannot be read as a Zarr group ({error}); {UNDERSTOOD}") from None
    kind = group.attrs.get("format")
    if kind == "dalle-samples":
        return _describe_samples(path)
    if kind != "dalle-tokens":
        raise UserError(f"{path}: is a Zarr group of another program; {UNDERSTOOD}")
    reader = TokenReader(path)
    present: list[Literal["text", "image"]] = [part for part in ("text", "image") if part in reader.attributes]
    parts = {part: reader.part(part) for part in present}
    rows = len(reader) if parts else 0
    arrays = _arrays(path, group)
    skipped = {part: state["skipped"] for part, state in parts.items()}
    identities = {part: state["identity"] for part, state in parts.items()}
    captions: list[dict[str, Any]] = []
    if "text" in parts and parts["text"]["rows"]:
        first = range(min(CAPTIONS, int(parts["text"]["rows"])))
        lengths = reader.read("text_length", np.array(first, dtype=np.int64))
        captions = [
            {"row": row, "tokens": int(length), "caption": caption}
            for row, length, caption in zip(first, lengths, reader.strings("caption", first), strict=True)
        ]
    sources = {str(identity["source"]) for identity in identities.values()}
    return {
        "what": "token store",
        "path": str(path),
        "rows": rows,
        "usable_rows": len(reader.usable()) if len(parts) == 2 else None,
        "complete": len(parts) == 2 and all(state["complete"] for state in parts.values()),
        "parts": {
            part: {"rows": state["rows"], "complete": state["complete"], "made_with": state["identity"]}
            for part, state in parts.items()
        },
        "source": sources.pop() if len(sources) == 1 else sorted(sources) or None,
        "tokenizer": identities.get("text", {}).get("tokenizer"),
        "dvae": identities.get("image", {}).get("dvae"),
        "skipped": skipped,
        "arrays": arrays,
        "bytes": sum(array["bytes"] for array in arrays.values()),
        "captions": captions,
    }


def _describe_samples(path: Path) -> dict[str, Any]:
    import zarr

    group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
    request = dict(group.attrs["request"])
    total, committed = int(group["tokens"].shape[0]), int(group.attrs["rows"])
    return {
        "what": "sample store",
        "path": str(path),
        "rows": total,
        "committed": committed,
        "complete": committed == total,
        "samples_a_prompt": request["settings"]["n"],
        "prompts": request["prompts"],
        "seed": request["seed"],
        "settings": request["settings"],
        "prior": request["prior"],
        "arrays": _arrays(path, group),
    }


def _arrays(path: Path, group: Any) -> dict[str, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr wonders at the store's skipped-*.jsonl
        arrays = sorted(group.arrays())
    return {
        name: {
            "shape": list(array.shape),
            "dtype": "string" if array.dtype.kind not in "biuf" else str(array.dtype),
            "bytes": sum(file.stat().st_size for file in (path / name).rglob("*") if file.is_file()),
        }
        for name, array in arrays
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    recipe = checkpoint.recipe()
    run = checkpoint.path.parent if checkpoint.path.name.startswith("step-") else None
    files = [*checkpoint.files, "recipe.yaml", "trainer/optimizer.safetensors", "trainer/state.json"]
    return {
        "what": "checkpoint",
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "step": checkpoint.step,
        "updates": getattr(recipe, checkpoint.kind).training.updates,
        "identity": checkpoint.identity,
        "parameters": _values_in(checkpoint.path / "ema.safetensors"),
        "recipe": recipe.name,
        "belongs": checkpoint.belongs,
        "metrics": checkpoint.metrics,
        "files": {
            name: {"bytes": _size(checkpoint.path / name), "sha256": checkpoint.files.get(name)} for name in files
        },
        "checkpoints_in_run": [folder.name for folder in steps_in(run)] if run else [],
    }


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _values_in(file: Path) -> int | None:
    """How many numbers a safetensors file holds, from its header alone; None when there is no such file."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); restore it or use an older checkpoint") from None
    return sum(int(np.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


def _describe_tokenizer(path: Path) -> dict[str, Any]:
    from dalle_cli.text.bpe import Tokenizer

    tokenizer = Tokenizer.load(path)
    size = tokenizer.vocab_size
    first = BYTES if size > BYTES + 1 else 0  # the bytes themselves come first and tell nothing
    ids = sorted({round(first + i * (size - 1 - first) / (TOKEN_EXAMPLES - 1)) for i in range(TOKEN_EXAMPLES)})
    return {
        "what": "tokenizer",
        "path": tokenizer.name,
        "vocab_size": size,
        "sha256": tokenizer.identity,
        "examples": {str(i): tokenizer.decode([i]) for i in ids},
    }
