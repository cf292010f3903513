"""``precision: auto``: the faster of fp32 and bf16, measured on updates of a run's own sizes.

bf16 products are twice as fast on processors that have them, and slower than fp32 on others; how much of an update is
products depends on its sizes. So nothing but a measurement tells.
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

Precision = Literal["fp32", "bf16"]
ROUNDS = 5
"""Number of times that each precision is timed, by turns, after an update that warms it up."""
GAIN = 1.05
"""Factor by which bf16 must be faster to be chosen over the more exact fp32."""

Update = Callable[[], None]
"""Makes an update of a fresh model on made-up samples."""


def trial_update(
    recipe: Recipe, kind: Kind, engine: Replicated, decayed: set[str], loss: Callable[[], Tensor]
) -> Update:
    """Return a function that makes an update of the engine's model, as training does once a batch is read.

    It leaves the weights as they are: the learning rate is 0.
    """
    updates = AdamUpdates(engine, decayed, getattr(recipe, kind).adam, recipe.seed)

    def update() -> None:
        updates.zero_grad()
        engine.begin_micro_batch(last=True)
        engine.backward(loss())
        engine.collect_gradients(0)
        updates.step(0.0)
        engine.release_gathered()
        synchronize(engine.group.device)

    return update


def seconds_of(*updates: Update) -> list[float]:
    """Return the seconds that each of ``updates`` takes, the least of a few rounds in which all take turns."""
    found: list[list[float]] = [[] for _ in updates]
    for _ in range(1 + ROUNDS):
        for times, update in zip(found, updates, strict=True):
            began = time.perf_counter()
            update()
            times.append(time.perf_counter() - began)
    return [min(times[1:]) for times in found]


def settle_precision(
    recipe: Recipe, kind: Kind, out: Path | None, group: Group, trial: Callable[[Recipe], Update]
) -> Recipe:
    """Return the recipe with fp32 or bf16 in place of a stage's ``precision: auto``, the same on all ranks.

    A run in ``out`` that has begun, if any, keeps its precision. A GPU gets bf16 if it computes in it. For a CPU, the
    updates of ``trial``, given the recipe in either precision, are timed; the choice is kept in the user's cache, so
    that a recipe of the same sizes trains to the same bytes whenever it is run on the same kind of processor.
    """
    if getattr(recipe, kind).precision != "auto":
        return recipe
    chosen: Precision = "fp32"
    if out is not None and (begun := _begun_in(out, kind)) is not None:
        chosen = begun
    elif group.device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif group.device.type == "cpu" and group.broadcast(float(group.leads and _measure(recipe, kind, trial) == "bf16")):
        chosen = "bf16"
    return with_precision(recipe, kind, chosen)


def with_precision(recipe: Recipe, kind: Kind, precision: str) -> Recipe:
    """Return the recipe with another precision of a stage."""
    return recipe.model_copy(update={kind: getattr(recipe, kind).model_copy(update={"precision": precision})})


def _begun_in(out: Path, kind: Kind) -> Precision | None:
    """Return the precision of the run in ``out``, or None if it has no checkpoint that can be read."""
    for folder in reversed(steps_in(out)):
        with suppress(Damaged):
            precision: Precision = getattr(open_checkpoint(folder, kind).recipe(), kind).precision
            return precision
    return None


@dataclass(frozen=True)
class _Choice:
    """A choice in the user's cache, with the seconds that an update took."""

    precision: Precision
    fp32: float
    bf16: float


def _measure(recipe: Recipe, kind: Kind, trial: Callable[[Recipe], Update]) -> Precision:
    use_settings(recipe)
    kept = user_cache("precision") / f"{_sizes_hash(recipe, kind)}.json"
    try:
        choice = read_typed(_Choice, kept)
    except (UserError, OSError):
        fp32, bf16 = seconds_of(*(trial(with_precision(recipe, kind, each)) for each in ("fp32", "bf16")))
        choice = _Choice("bf16" if bf16 * GAIN < fp32 else "fp32", fp32, bf16)
        with suppress(OSError):  # it is measured again where nothing can be kept
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, asdict(choice))
    log(
        f"train-{kind}: {kind}.precision auto is {choice.precision}: an update takes {choice.fp32:.3g} s in fp32, "
        f"{choice.bf16:.3g} s in bf16 on this kind of processor"
    )
    return choice.precision


def _sizes_hash(recipe: Recipe, kind: Kind) -> str:
    """Return a hash of all that the time of an update depends on."""
    stage = getattr(recipe, kind)
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    sizes = {
        "processor": {name: str(value) for name, value in processor.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kind": kind,
        "model": stage.model.model_dump(),
        "objective": stage.objective.model_dump(),
        "samples": [stage.training.batch_size, stage.training.micro_batch],
        "data": [recipe.image_size, recipe.dvae.model.codebook_size, recipe.tokenizer.model_dump()],
    }
    return hashlib.sha256(json_text(sizes).encode()).hexdigest()[:32]
