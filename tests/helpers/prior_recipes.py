"""Recipes of small priors, for tests of plans."""

from __future__ import annotations

from typing import Any

from dalle_cli.config.schema import Recipe


def tiny_prior(**changes: Any) -> Recipe:
    """Return a recipe with two layers of d = 16, T = 8 and S = 16 positions.

    ``changes`` are settings by dotted key, written with two underscores for each dot.
    """
    values = Recipe().model_dump()
    settings = {
        "image_size": 32, "threads": 1, "tokenizer.vocab_size": 400, "tokenizer.text_length": 8,
        "dvae.model.codebook_size": 64, "prior.model.layers": 2, "prior.model.heads": 2, "prior.model.d_head": 8,
        "prior.model.d_model": 16, "prior.model.grid": 4, "prior.training.batch_size": 16, "prior.training.updates": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    for key, value in settings.items():
        block = values
        *path, name = key.split(".")
        for part in path:
            block = block[part]
        block[name] = value
    return Recipe.model_validate(values)


def sized_prior(layers: int, heads: int, d_head: int, grid: int, text: int, batch: int, **changes: Any) -> Recipe:
    """Return a recipe of these sizes, else as ``tiny_prior``."""
    sizes = {
        "prior__model__layers": layers, "prior__model__heads": heads, "prior__model__d_head": d_head,
        "prior__model__d_model": heads * d_head, "prior__model__grid": grid, "image_size": 8 * grid,
        "tokenizer__text_length": text, "prior__training__batch_size": batch,
    }  # fmt: skip
    return tiny_prior(**sizes, **changes)
