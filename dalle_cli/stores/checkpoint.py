"""Checkpoints: directories of safetensors, a recipe and a manifest; no pickle is ever read.

A training run's folder holds ``step-00001000/`` and so on, each a checkpoint, and ``metrics.jsonl``. Commands take
either one checkpoint or the run's folder, which stands for its newest checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dalle_cli.errors import UserError
from dalle_cli.recipes.load import dump_recipe, load_recipe
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.files import new_directory, sha256_file, write_json

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
Kind = Literal["dvae", "prior", "clip"]
Weights = Literal["ema", "raw"]
_FILES: dict[Weights, str] = {"raw": "model.safetensors", "ema": "ema.safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its manifest read and checked."""

    path: Path
    kind: Kind
    step: int
    belongs: dict[str, str] = field(default_factory=dict)
    """Hashes of the artifacts it was trained with, such as ``{"tokenizer": ..., "dvae": ...}``."""
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file of weights."""

    @property
    def identity(self) -> str:
        """sha256 of the weights that other stages use (the EMA)."""
        return self.files[_FILES["ema"]]

    def recipe(self) -> Recipe:
        """The resolved recipe it was trained by."""
        return load_recipe(self.path / "recipe.yaml")

    def tensors(self, weights: Weights = "ema") -> dict[str, torch.Tensor]:
        """Weights by name, on the CPU. Raises UserError when the file is damaged or not the manifest's."""
        file = self.path / _FILES[weights]
        if file.is_file() and sha256_file(file) != self.files.get(file.name):
            raise UserError(f"{file}: damaged: its sha256 is not the manifest's; restore it or use an older checkpoint")
        return _load_tensors(file)

    def trainer(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Optimizer tensors by name and the rest of the trainer's state."""
        folder = self.path / "trainer"
        state = folder / "state.json"
        try:
            return _load_tensors(folder / "optimizer.safetensors"), json.loads(state.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{state}: missing or damaged ({error}); restore it or use an older checkpoint") from None


def save_checkpoint(
    path: Path,
    *,
    kind: Kind,
    step: int,
    recipe: Recipe,
    belongs: Mapping[str, str],
    metrics: Mapping[str, float],
    weights: Mapping[Weights, Mapping[str, torch.Tensor]],
    optimizer: Mapping[str, torch.Tensor],
    trainer_state: Mapping[str, Any],
) -> None:
    """Write a checkpoint beside ``path`` and rename it into place.

    Raises:
        UserError: the disk is full or the place may not be written; earlier checkpoints stay.
    """
    from safetensors.torch import save_file

    def save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
        except OSError:
            raise
        except Exception as error:  # safetensors reports a failed write as its own error, with the number inside
            if "space" in str(error).lower() or "os error 28" in str(error).lower():
                raise OSError(28, str(error)) from error
            raise

    with new_directory(path) as folder:
        for which, tensors in weights.items():
            save(tensors, folder / _FILES[which])
        (folder / "trainer").mkdir()
        save(optimizer, folder / "trainer" / "optimizer.safetensors")
        write_json(folder / "trainer" / "state.json", dict(trainer_state))
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        write_json(
            folder / "manifest.json",
            {
                "format": "dalle-checkpoint",
                "version": FORMAT_VERSION,
                "kind": kind,
                "step": step,
                "belongs": dict(belongs),
                "metrics": dict(metrics),
                "files": {_FILES[which]: sha256_file(folder / _FILES[which]) for which in weights},
            },
        )


def steps_in(run: Path) -> list[Path]:
    """Whole checkpoints in a run's folder, oldest first."""
    return sorted(p for p in run.glob("step-*") if (p / "manifest.json").is_file())


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` updates lies."""
    return run / f"step-{step:08d}"


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what a killed run had begun to delete."""
    kept = steps_in(run)[-keep:]
    for old in set(run.glob("step-*")) - set(kept):
        (old / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(old)


def open_checkpoint(path: Path, kind: Kind | None = None) -> Checkpoint:
    """Read the manifest of a checkpoint, or of the newest in a run's folder.

    Raises:
        UserError: there is none, it is of another kind or of a newer format, or its manifest is damaged.
    """
    folder = path
    if not (path / "manifest.json").is_file():
        steps = steps_in(path) if path.is_dir() else []
        if not steps:
            what = f"a {kind} checkpoint" if kind else "a checkpoint"
            raise UserError(f"{path}: holds no checkpoint; name {what}: a folder with manifest.json, or its run")
        folder = steps[-1]
    manifest_path = folder / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        version = manifest["version"]
        found = Checkpoint(
            folder, manifest["kind"], manifest["step"], manifest["belongs"], manifest["metrics"], manifest["files"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_path}: damaged or not a checkpoint's manifest ({error!r})") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{manifest_path}: format version {version} is newer than this dalle reads; upgrade dalle")
    if kind is not None and found.kind != kind:
        raise UserError(f"{folder}: is a {found.kind} checkpoint where a {kind} is needed")
    return found


def check_belongs(user: Checkpoint, role: str, given_hash: str, given_name: str) -> None:
    """Refuse to join ``user`` with an artifact other than the one it was trained with, naming both."""
    expected = user.belongs.get(role)
    if expected is not None and expected != given_hash:
        raise UserError(
            f"{user.path} was trained with the {role} {expected[:12]}, but {given_name} is {given_hash[:12]}; "
            f"give the {role} it belongs to"
        )


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing from its checkpoint; restore it or train again") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {error}; restore it or use an older checkpoint") from None
