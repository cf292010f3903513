"""Time on this machine: that of each stage's updates, and how many of them a time budget holds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dalle_cli.clip.train import clip_update
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import Source
from dalle_cli.distributed.device import choose_device, fast_matmul, prepare_process, use_settings
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.train import dvae_update
from dalle_cli.precision.choice import seconds_of
from dalle_cli.prior.counts import count_flops, count_parameters
from dalle_cli.prior.train import prior_update
from dalle_cli.stores.checkpoint import Kind
from dalle_cli.training.precision_choice import Update, settle_precision, with_precision

SHARES: dict[Kind, float] = {"dvae": 0.55, "prior": 0.39, "clip": 0.06}
"""Share of a budget that each stage gets, found with scripts/bench/quality."""
UPDATES_SHARE = 0.85
"""Share of a stage's time that its updates get; the rest is its start, validations, checkpoints and encoding."""
LONG_UPDATE = 2.0
"""Seconds of an update above which it is reckoned from those of one and of two samples."""
LARGEST_FLOPS = 1e12
"""FLOPs of a sample above which the prior is not timed on a CPU, since one alone takes too long."""
SMALL_SIDE = 64
"""Side in pixels of the pictures that a dVAE for larger ones is timed on, a multiple of every downsampling."""


@dataclass(frozen=True)
class StageTime:
    """Time of a stage's training on this machine, without reading its data."""

    kind: Kind
    updates: int
    seconds: float | None
    """Seconds of an update; None if the stage is too large to be timed here."""

    @property
    def hours(self) -> float:
        """Hours of all updates, 0 if their time is unknown."""
        return self.updates * (self.seconds or 0.0) / 3600


def updates_within(recipe: Recipe, source: Source, minutes: float) -> dict[Kind, int]:
    """Return how many updates of each stage fit into ``minutes`` on this machine, by timing a few.

    Pictures and tokens are random; ``source`` is the one to be trained on.
    """
    seconds = seconds_per_update(recipe, source)
    return {
        kind: max(100, 10 * round(6 * minutes * SHARES[kind] * UPDATES_SHARE / each)) for kind, each in seconds.items()
    }


def seconds_per_update(recipe: Recipe, source: Source) -> dict[Kind, float]:
    """Return the time of an update of each stage on this machine, without loading its data."""
    trials = _trials(recipe, source)
    return {kind: _seconds_of_settled(recipe, kind, trial) for kind, trial in trials.items()}


def stage_times(recipe: Recipe, *, prior_fits: bool) -> list[StageTime]:
    """Return the time of each stage's training on this machine, by timing a few updates, which takes some seconds.

    A long update is reckoned from those of one and of two samples, since its time grows with the samples. The prior is
    not timed unless it fits into memory, nor on a CPU if it is very large.
    """
    on_cpu = choose_device(recipe.device).type == "cpu"
    too_large = on_cpu and count_flops(recipe, count_parameters(recipe)).executed > LARGEST_FLOPS
    with tempfile.TemporaryDirectory(prefix="dalle-plan-") as folder:
        Image.new("RGB", (8, 8)).save(Path(folder, "0.png"))
        Path(folder, "0.txt").write_text("a picture\n")
        data = {"train": folder, "weights": None, "validation": None, "holdout": 0.0, "exclude": None}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        times = []
        for kind, trial in _trials(recipe, open_source(folder)).items():
            timed = kind != "prior" or (prior_fits and not too_large)
            seconds = _reckoned(recipe, kind, trial) if timed else None
            times.append(StageTime(kind, getattr(recipe, kind).training.updates, seconds))
        return times


def _trials(recipe: Recipe, source: Source) -> dict[Kind, Callable[[Recipe], Update]]:
    """Prepare this process, and return for each stage a function that makes its update for timing."""
    use_settings(recipe)
    device = choose_device(recipe.device)
    prepare_process(device)

    def prior(tried: Recipe) -> Update:
        update = prior_update(tried, device)

        def fast() -> None:
            with fast_matmul():
                update()

        return fast

    return {
        "dvae": lambda tried: dvae_update(tried, source, device),
        "prior": prior,
        "clip": lambda tried: clip_update(tried, device),
    }


def _seconds_of_settled(recipe: Recipe, kind: Kind, trial: Callable[[Recipe], Update]) -> float:
    """Return the mean seconds of a training's updates in the precision that a run would take."""
    if kind != "clip":
        recipe = settle_precision(recipe, kind, None, Group(device=choose_device(recipe.device)), trial)
    perceptual = recipe.dvae.objective.perceptual
    if kind != "dvae" or not perceptual.weight or perceptual.enlarged_from is None:
        return seconds_of(trial(recipe))
    late = max(0.0, 1 - perceptual.enlarged_from / recipe.dvae.training.updates)
    before, after = (seconds_of(trial(_with_enlarged_from(recipe, first))) for first in (None, 0))
    return (1 - late) * before + late * after


def _reckoned(recipe: Recipe, kind: Kind, trial: Callable[[Recipe], Update]) -> float:
    """Return the seconds of an update, measured, or if it is long, reckoned from smaller ones in 32 bit."""
    batch: int = getattr(recipe, kind).training.batch_size
    area = 1.0
    small = with_precision(recipe, kind, "fp32") if kind != "clip" else recipe
    if kind == "dvae" and recipe.image_size > SMALL_SIDE:  # its work grows with the pictures' area
        small = small.model_copy(update={"image_size": SMALL_SIDE})
        area = (recipe.image_size / SMALL_SIDE) ** 2
    one = area * _once(trial(_with_batch(small, kind, 1)))
    if one * batch < LONG_UPDATE:
        return _seconds_of_settled(recipe, kind, trial)
    two = area * _once(trial(_with_batch(small, kind, 2)))
    return one + (batch - 1) * max(two - one, 0.0)


def _once(update: Update) -> float:
    """Return the seconds of the second update, since the first one also sets the model up."""
    update()
    began = time.perf_counter()
    update()
    return time.perf_counter() - began


def _with_enlarged_from(recipe: Recipe, first: int | None) -> Recipe:
    perceptual = recipe.dvae.objective.perceptual.model_copy(update={"enlarged_from": first})
    objective = recipe.dvae.objective.model_copy(update={"perceptual": perceptual})
    return recipe.model_copy(update={"dvae": recipe.dvae.model_copy(update={"objective": objective})})


def _with_batch(recipe: Recipe, kind: Kind, size: int) -> Recipe:
    stage = getattr(recipe, kind)
    training = stage.training.model_copy(update={"batch_size": size, "micro_batch": None})
    return recipe.model_copy(update={kind: stage.model_copy(update={"training": training})})
