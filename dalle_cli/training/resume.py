"""Whether a run may go on from its newest checkpoint under the recipe of today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Checkpoint

# What may change in a stage when its run goes on: nothing here touches the mathematics.
_FREE_KEYS = (
    *(f"training.{key}" for key in ("log_every", "validate_every", "validation_samples", "save_every", "keep")),
    "training.workers",
    "training.micro_batch",
    "model.checkpoint_resblocks",
    "powersgd.offload",
)
# What may change too, but is said: sums are added up in another order.
_NAMED_KEYS = tuple(f"sharding.{key}" for key in ("zero", "offload", "node_size"))


def refuse_other_settings(
    out: Path, found: Checkpoint, recipe: Recipe, blocks: tuple[str, ...], belongs: Mapping[str, str]
) -> None:
    """Refuse to go on from ``found`` with other artifacts than ``belongs``, or other ``blocks`` of the recipe.

    Raises:
        UserError: naming the first difference, and how to mend it.
    """
    for role, value in belongs.items():
        if found.belongs.get(role) != value:
            raise UserError(
                f"{out}: was begun with the {role} {str(found.belongs.get(role))[:12]}, now {value[:12]}; "
                "choose another --out, or delete the folder to begin again"
            )
    then, now = found.recipe().model_dump(), recipe.model_dump()
    free = {f"{found.kind}.{key}" for key in _FREE_KEYS}
    named = {f"{found.kind}.{key}" for key in _NAMED_KEYS}
    rate = getattr(recipe, found.kind).learning_rate
    if rate.schedule != "cosine" or rate.decay_updates:
        free.add(f"{found.kind}.training.updates")
    for block in blocks:
        for name, old, new in _differences(block, then[block], now[block]):
            if name in named:
                log(f"{out}: goes on with {name} = {new!r}, was {old!r}")
            elif name not in free:
                raise UserError(
                    f"{out}: was begun with {name} = {old!r}, the recipe now says {new!r}; "
                    "set it back, choose another --out, or delete the folder to begin again"
                )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new
