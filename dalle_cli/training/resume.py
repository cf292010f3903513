"""Resuming: the check that a run may continue from its newest checkpoint under the current recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Checkpoint, Kind

_BLOCKS: dict[Kind, tuple[str, ...]] = {
    "dvae": ("seed", "image_size", "data", "dvae"),
    "prior": ("seed", "image_size", "data", "tokenizer", "prior"),
    "clip": ("seed", "image_size", "data", "tokenizer", "clip"),
}
"""Blocks of the recipe that a stage's training depends on."""
_FREE_DATA: dict[Kind, frozenset[str]] = {
    "dvae": frozenset({"data.train", "data.views"}),
    "prior": frozenset({"data.train"}),
    "clip": frozenset({"data.train", "data.views"}),
}
"""Settings of the data that may change, by stage: a source is known by its identity, and views are the prior's."""
_FREE_KEYS = (
    *(
        f"training.{key}"
        for key in ("log_every", "validate_every", "validation_samples", "save_every", "keep", "patience")
    ),
    "training.workers",
    "drawings",
    "training.micro_batch",
    "model.checkpoint_resblocks",
    "model.codebook_std",
    "powersgd.offload",
    "sharding.nvme_path",
)
"""Settings of a stage that may change because they do not affect the results."""
_LOGGED_KEYS = tuple(f"sharding.{key}" for key in ("engine", "zero", "offload", "node_size"))
"""Settings of a stage that may change but are logged, because they change the order of summation."""
_SAVING_KEYS = tuple(f"training.{key}" for key in ("save_every", "validate_every", "validation_samples", "patience"))
"""Settings that decide when checkpoints are saved, which shares PowerSGD's errors anew among the nodes."""


def check_resumable(out: Path, checkpoint: Checkpoint, recipe: Recipe, belongs: Mapping[str, str]) -> None:
    """Check that the run in ``out`` may resume from ``checkpoint`` with ``recipe``.

    Raises:
        UserError: a setting, or the hash in ``belongs`` of an artifact that the run is trained with, has changed.
    """
    for role, value in belongs.items():
        if checkpoint.belongs.get(role) != value:
            raise UserError(
                f"{out}: was begun with the {role} {str(checkpoint.belongs.get(role))[:12]}, now {value[:12]}; "
                "choose another --out, or delete the folder to begin again"
            )
    then, now = checkpoint.recipe().model_dump(), recipe.model_dump()
    free = {f"{checkpoint.kind}.{key}" for key in _FREE_KEYS} | _FREE_DATA[checkpoint.kind]
    logged = {f"{checkpoint.kind}.{key}" for key in _LOGGED_KEYS}
    rate = getattr(recipe, checkpoint.kind).learning_rate
    if rate.schedule == "plateau" and rate.plateau_watches == "training":
        free.discard(f"{checkpoint.kind}.training.validate_every")  # it is the window of the watched mean
    if rate.schedule != "cosine" or rate.decay_updates:
        free.add(f"{checkpoint.kind}.training.updates")
    if checkpoint.kind == "prior" and recipe.prior.powersgd.rank:
        saving = {f"prior.{key}" for key in _SAVING_KEYS}
        free, logged = free - saving, logged | saving
    for name in ("threads", "compile", "tf32"):
        if then[name] != now[name]:
            log(f"{out}: resumes with {name} = {now[name]!r}, was {then[name]!r}, so sums are rounded otherwise")
    for block in _BLOCKS[checkpoint.kind]:
        for name, old, new in _differences(block, then[block], now[block]):
            if name in logged:
                log(f"{out}: resumes with {name} = {new!r}, was {old!r}")
            elif name not in free:
                further = ", or give --extend N to train a finished run further" if name.endswith("g.updates") else ""
                raise UserError(
                    f"{out}: was begun with {name} = {old!r}, the recipe now says {new!r}; "
                    f"set it back, choose another --out, or delete the folder to begin again{further}"
                )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new
