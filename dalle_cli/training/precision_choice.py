"""``precision: auto``: on a CPU the faster of fp32 and bf16, measured on updates of a run's own sizes.

bf16 products are twice as fast on processors that have them, and slower than fp32 on others. The share of products in
an update depends on its sizes, so a run measures both.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import synchronize, use_settings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import Group
from dalle_cli.errors import Damaged, UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Kind, open_checkpoint, steps_in
from dalle_cli.stores.files import json_text, user_cache, write_json
from dalle_cli.stores.typed import read_typed
from dalle_cli.training.updates import AdamUpdates

PRECISIONS = ("fp32", "bf16", "fp16")
ROUNDS = 5
"""Number of updates that are timed in each precision, after one that warms it up."""
GAIN = 1.05
"""Factor by which bf16 must be faster to be chosen over the more exact fp32."""

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


def seconds_of(update: Update) -> float:
    """Return the seconds that an update takes, the least of a few."""
    times = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        update()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def settle_precision(
    recipe: Recipe, kind: Kind, out: Path | None, group: Group, trial: Callable[[Recipe], Update]
) -> Recipe:
    """Return the recipe with a precision in place of a stage's ``precision: auto``, the same on all ranks; log it.

    A run in ``out`` that has begun, if any, keeps its precision. GPUs get bf16 if all of them compute in it. One
    process on a CPU times updates of ``trial``, given the recipe in either precision. The choice is kept in the user's
    cache, so that a recipe of the same sizes trains to the same bytes whenever it is run on the same kind of processor.
    """
    if getattr(recipe, kind).precision != "auto":
        return recipe
    begun = None if out is None or not group.leads else _begun_in(out, kind)
    known = group.broadcast(-1.0 if begun is None else float(PRECISIONS.index(begun)))
    if known >= 0:
        chosen, reason = PRECISIONS[int(known)], "as the run has begun"
    elif group.device.type == "cuda":
        lacks_it = group.any(not torch.cuda.is_bf16_supported(including_emulation=False))
        chosen = "fp32" if lacks_it else "bf16"
        reason = "a GPU lacks bf16" if lacks_it else "the GPU computes in bf16"
    elif group.device.type != "cpu":
        chosen, reason = "fp32", f"{group.device.type} trains in 32 bit"
    elif group.size > 1:
        chosen, reason = "fp32", "bf16 is tried in a single process alone"
    else:
        chosen, reason = _measure(recipe, kind, trial)
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


@dataclass(frozen=True)
class _Choice:
    """A choice in the user's cache, with the seconds that an update took."""

    precision: Literal["fp32", "bf16"]
    fp32: float
    bf16: float


def _measure(recipe: Recipe, kind: Kind, trial: Callable[[Recipe], Update]) -> tuple[str, str]:
    """Return the precision that is faster in this process, or that was when it was measured, and the reason."""
    use_settings(recipe)
    name, when = f"{_sizes_hash(recipe, kind)}.json", "measured on this kind of processor before"
    try:
        choice = read_typed(_Choice, user_cache("precision") / name)
    except (UserError, OSError):
        log(f"{kind}.precision: auto times updates in fp32 and in bf16")
        # One after the other, since a model that just fits leaves no room for a second one.
        fp32, bf16 = (seconds_of(trial(with_precision(recipe, kind, each))) for each in ("fp32", "bf16"))
        choice, when = _Choice("bf16" if bf16 * GAIN < fp32 else "fp32", fp32, bf16), "measured now"
        with suppress(UserError, OSError):  # it is measured again where nothing can be kept
            folder = user_cache("precision")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, asdict(choice))
    return choice.precision, f"an update takes {choice.fp32:.3g} s in fp32, {choice.bf16:.3g} s in bf16, {when}"


def _sizes_hash(recipe: Recipe, kind: Kind) -> str:
    """Return a hash of all that the time of an update depends on."""
    stage = getattr(recipe, kind)
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    objective = stage.objective.model_dump()
    sizes = {
        "processor": {name: str(value) for name, value in processor.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kind": kind,
        "model": stage.model.model_dump(),
        # Schedules change values, and no time.
        "objective": {key: value for key, value in objective.items() if not _is_schedule(value)},
        "samples": [stage.training.batch_size, stage.training.micro_batch],
        "data": [recipe.image_size, recipe.dvae.model.codebook_size, recipe.tokenizer.model_dump()],
    }
    return hashlib.sha256(json_text(sizes).encode()).hexdigest()[:32]


def _is_schedule(value: object) -> bool:
    return isinstance(value, dict) and "updates" in value
