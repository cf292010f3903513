"""Settings that a recipe may have and that its author hardly meant, such as a ramp longer than the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from dalle_cli.config.schema import DvaeSettings, Recipe

TRAINED: tuple[Literal["dvae", "prior", "clip"], ...] = ("dvae", "prior", "clip")
"""Stages that train, by their key in a recipe."""


def odd_settings(recipe: Recipe, kind: Literal["dvae", "prior", "clip"]) -> list[str]:
    """Return a line for each odd setting of a stage: the key, what will happen, and what to change."""
    return list(_odd(recipe, kind))


def _odd(recipe: Recipe, kind: Literal["dvae", "prior", "clip"]) -> Iterator[str]:
    stage = getattr(recipe, kind)
    rate, training = stage.learning_rate, stage.training
    updates, run = training.updates, f"the run has {training.updates:,} updates"
    if rate.warmup_updates >= updates:
        yield (
            f"{kind}.learning_rate.warmup_updates is {rate.warmup_updates:,} and {run}, so the rate never comes to its "
            f"peak; lower it to a tenth of {kind}.training.updates"
        )
    if rate.schedule == "cosine" and (rate.decay_updates or 0) > updates:
        yield (
            f"{kind}.learning_rate.decay_updates is {rate.decay_updates:,} and {run}, so the cosine is cut short; "
            "lower it, or leave it out"
        )
    averaged = 1 / (1 - training.ema_decay)
    if averaged > updates and not training.ema_warmup:
        yield (
            f"{kind}.training.ema_decay {training.ema_decay:g} averages weights over {averaged:,.0f} updates and {run}"
            ", so its EMA weights lag behind; lower it, or set ema_warmup: true"
        )
    if isinstance(stage, DvaeSettings):
        for name, ramp in stage.objective:
            if getattr(ramp, "updates", 0) > updates and ramp.start != ramp.end:
                yield (
                    f"dvae.objective.{name} takes {ramp.updates:,} updates and {run}, so it never comes to its end of "
                    f"{ramp.end:g}; set dvae.objective.{name}.updates to {updates} or fewer"
                )
        since = stage.objective.perceptual.enlarged_from
        if since is not None and since >= updates:
            yield (
                f"dvae.objective.perceptual.enlarged_from is {since:,} and {run}, so no picture is enlarged; set it to "
                f"about {updates * 17 // 20}, or leave it out"
            )
    if kind == "prior" and recipe.sampling.guidance != 1 and not recipe.prior.caption_dropout:
        yield (
            f"sampling.guidance is {recipe.sampling.guidance:g} and prior.caption_dropout 0, so that dalle sample will "
            "refuse to draw; set prior.caption_dropout: 0.1, or guidance: 1"
        )
