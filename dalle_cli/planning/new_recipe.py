"""Settings of a recipe that follow from a source: what ``dalle init`` fills in."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.data.scan import ScanResult, scan
from dalle_cli.data.workers import available_cores
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Kind
from dalle_cli.text.tokenize import train_tokenizer

PHOTOGRAPH_VIEWS = 8
"""Number of crops of each photograph for the prior; see docs/quality.md for what they bring."""
HELD_OUT = 2000
"""Number of held-out samples that suffices, however large the source is."""
DRAWINGS_PERCEPTUAL_WEIGHT = 1.0
"""Largest weight of the dVAE's perceptual term on drawings; see docs/quality.md for what it brings."""
SEEN_OFTEN = 16
"""A prior that sees each view of a picture more often than this memorises them, unless there is token noise."""
TOKEN_NOISE = 0.15
"""Token noise for such a prior; see docs/quality.md for what it brings."""
TOKENS_A_WORD = 1.4
"""Number of BPE tokens that a word takes, roughly."""
CAPTIONS_A_TOKEN = 4
"""Number of captions for each token of the vocabulary."""
CHECKPOINTS = 8
"""Number of checkpoints, with a validation each, in a training."""
FEW_CAPTIONS = 200_000
"""Number of captions up to which a tokenizer is trained on trial, which takes seconds."""


def fill_in(template: Path, source: str, minutes: float | None) -> dict[str, Any]:
    """Return settings of the recipe ``template``, by dotted key, for a source and, unless None, for a time budget.

    Every sample of the source is read, and a few updates of each stage are timed.

    Raises:
        UserError: the source cannot be read, or none of its samples can be used.
    """
    recipe, opened = load_recipe(template), open_source(source)
    log(opened.describe())
    found = scan(opened, recipe.data, recipe.image_size, workers=available_cores())
    values = {"data.train": source, **settings_for(found, recipe)}
    if found.captions <= FEW_CAPTIONS:
        with tempfile.TemporaryDirectory(prefix="dalle-init-") as folder:
            trained = train_tokenizer(_with(template, values), opened, Path(folder))
        values["tokenizer.vocab_size"] = trained.vocab_size  # fewer than wanted if the words run out
    if minutes is not None:
        # Imported here, since a new recipe without a time budget needs no torch.
        from dalle_cli.planning.budget import updates_within

        chosen = _with(template, values)
        updates = updates_within(chosen, opened, minutes)
        for kind, count in updates.items():
            log(f"init: {count} updates of the {kind} within {minutes:g} minutes on this machine")
        values |= updates_settings(updates, chosen)
    if times_seen(_with(template, values), found.kept) > SEEN_OFTEN:
        values["prior.token_noise"] = TOKEN_NOISE
    shown = {key: value for key, value in values.items() if not key.endswith((".updates", "_every", "data.train"))}
    log(f"init: {', '.join(f'{key} {json.dumps(value)}' for key, value in shown.items())}")
    return values


def _with(template: Path, values: dict[str, Any]) -> Recipe:
    return load_recipe(template, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def settings_for(found: ScanResult, recipe: Recipe) -> dict[str, Any]:
    """Return settings for a source, by dotted key, given what ``scan`` found in it.

    Raises:
        UserError: no sample can be used.
    """
    if not found.kept:
        raise UserError(
            f"{found.source}: none of its {found.samples} samples can be used with the recipe's filters; "
            "run dalle scan to see why"
        )
    photographs = found.picture_formats.get("JPEG", 0) > sum(found.picture_formats.values()) / 2
    vocabulary = 2 ** max(9, min(14, round(math.log2(found.captions / CAPTIONS_A_TOKEN))))
    tokens = round(found.measures["words a caption"]["99%"] * TOKENS_A_WORD)
    values: dict[str, Any] = {
        "data.holdout": recipe.data.holdout if found.kept * recipe.data.holdout <= HELD_OUT else _share(found.kept),
        "data.crop": photographs,
        "data.views": PHOTOGRAPH_VIEWS if photographs else 1,
        "tokenizer.vocab_size": vocabulary,
        "tokenizer.text_length": max(16, min(256, -(-tokens // 8) * 8)),
    }
    if not photographs and recipe.dvae.objective.perceptual.weight > DRAWINGS_PERCEPTUAL_WEIGHT:
        values["dvae.objective.perceptual.weight"] = DRAWINGS_PERCEPTUAL_WEIGHT
    if found.measures["shorter side"]["50%"] < recipe.image_size:
        side = recipe.dvae.model.downsampling * 4
        values["image_size"] = max(side, int(found.measures["shorter side"]["50%"]) // side * side)
    return values


def times_seen(recipe: Recipe, samples: int) -> float:
    """Return how often the prior's training sees each view of each picture of a source with that many samples."""
    return recipe.prior.training.updates * recipe.prior.training.batch_size / (samples * recipe.data.views)


def updates_settings(updates: dict[Kind, int], recipe: Recipe) -> dict[str, Any]:
    """Return settings, by dotted key, for that many updates of each stage, with its ramps stretched alike."""
    values: dict[str, Any] = {}
    for kind, count in updates.items():
        training = getattr(recipe, kind).training
        values[f"{kind}.training.updates"] = count
        for key in ("save_every", "validate_every"):
            values[f"{kind}.training.{key}"] = max(25, count // CHECKPOINTS)
        if kind == "dvae":
            for name, ramp in recipe.dvae.objective:
                if getattr(ramp, "updates", 0):
                    values[f"dvae.objective.{name}.updates"] = round(ramp.updates * count / training.updates)
            if (since := recipe.dvae.objective.perceptual.enlarged_from) is not None:
                values["dvae.objective.perceptual.enlarged_from"] = round(since * count / training.updates)
    return values


def _share(samples: int) -> float:
    return float(f"{HELD_OUT / samples:.1g}")
