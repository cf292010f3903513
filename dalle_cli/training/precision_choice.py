"""``precision: auto`` of a stage that trains: on a CPU the faster of fp32 and bf16, measured on its updates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import gpu_precision, lacks_bf16, synchronize, use_settings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import Group
from dalle_cli.errors import Damaged
from dalle_cli.precision.choice import faster_precision
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Kind, open_checkpoint, steps_in
from dalle_cli.training.updates import AdamUpdates

PRECISIONS = ("fp32", "bf16", "fp16")
Update = Callable[[], None]
"""Makes an update of a fresh model on made-up samples."""


def trial_update(
    recipe: Recipe, kind: Kind, engine: Replicated, decayed: set[str], loss: Callable[[int], Tensor]
) -> Update:
    """Return a function that makes an update of the engine's model, as training does once a batch is read.

    ``loss`` gives that of a micro-batch of so many samples. The weights stay as they are: the learning rate is 0.
    """
    stage = getattr(recipe, kind)
    updates = AdamUpdates(engine, decayed, stage.adam, recipe.seed)
    batch, micro_batch = stage.training.batch_size, stage.training.micro_batch or stage.training.batch_size

    def update() -> None:
        updates.zero_grad()
        for first in range(0, batch, micro_batch):
            engine.begin_micro_batch(last=first + micro_batch >= batch)
            engine.backward(loss(min(micro_batch, batch - first)))
        engine.collect_gradients(0)
        updates.step(0.0)
        engine.release_gathered()
        synchronize(engine.group.device)

    return update


def settle_precision(
    recipe: Recipe, kind: Kind, out: Path | None, group: Group, trial: Callable[[Recipe], Update]
) -> Recipe:
    """Return the recipe with a precision in place of a stage's ``precision: auto``, the same on all ranks; log it.

    A run in ``out`` that has begun, if any, keeps its precision. GPUs get bf16 if all of them compute in it. One
    process on a CPU times updates of ``trial``, given the recipe in either precision.
    """
    if getattr(recipe, kind).precision != "auto":
        return recipe
    begun = None if out is None or not group.leads else _begun_in(out, kind)
    known = group.broadcast(-1.0 if begun is None else float(PRECISIONS.index(begun)))
    if known >= 0:
        chosen, reason = PRECISIONS[int(known)], "as the run has begun"
    elif group.device.type != "cpu":
        chosen, reason = gpu_precision(group.device, group.any(lacks_bf16(group.device)))
    elif group.size > 1:
        chosen, reason = "fp32", "bf16 is tried in a single process alone"
    else:
        use_settings(recipe)
        chosen, reason = faster_precision(
            f"{kind}.precision",
            "an update",
            _sizes(recipe, kind),
            lambda tried: trial(with_precision(recipe, kind, tried)),
        )
    if group.leads:
        log(f"{kind}.precision: auto is {chosen}: {reason}")
    return with_precision(recipe, kind, chosen)


def with_precision(recipe: Recipe, kind: Kind, precision: str) -> Recipe:
    """Return the recipe with another precision of a stage."""
    return recipe.model_copy(update={kind: getattr(recipe, kind).model_copy(update={"precision": precision})})


def _begun_in(out: Path, kind: Kind) -> str | None:
    """Return the precision of the run in ``out``, or None if it has no checkpoint that can be read."""
    for folder in reversed(steps_in(out)):
        with suppress(Damaged):
            precision: str = getattr(open_checkpoint(folder, kind).recipe(), kind).precision
            return precision
    return None


def _sizes(recipe: Recipe, kind: Kind) -> dict[str, Any]:
    """Return the settings that the time of an update depends on."""
    stage = getattr(recipe, kind)
    objective = stage.objective.model_dump()
    if kind == "dvae":  # the update that is timed is the first one
        objective["perceptual"]["enlarged_from"] = objective["perceptual"]["enlarged_from"] == 0
    return {
        "kind": kind,
        "model": stage.model.model_dump(),
        # Schedules change values, and no time.
        "objective": {key: value for key, value in objective.items() if not _is_schedule(value)},
        "samples": [stage.training.batch_size, stage.training.micro_batch],
        "data": [recipe.image_size, recipe.dvae.model.codebook_size, recipe.tokenizer.model_dump()],
    }


def _is_schedule(value: object) -> bool:
    return isinstance(value, dict) and "updates" in value
