"""The prior that the benchmarks measure, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_cli.config.schema import PriorModel
from dalle_cli.prior.model import Prior


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that both sides of a comparison have."""

    layers: int
    heads: int = 8
    d_head: int = 64
    grid: int = 32
    text_length: int = 256
    text_vocab: int = 16384
    image_vocab: int = 8192


def build_prior(sizes: ModelSizes, **settings: object) -> Prior:
    """Return an untrained prior, which is as fast as a trained one. ``settings`` are further settings of the model."""
    model = PriorModel.of_heads(
        layers=sizes.layers, heads=sizes.heads, d_head=sizes.d_head, grid=sizes.grid, **settings
    )
    return Prior(model, sizes.text_length, sizes.text_vocab, sizes.image_vocab)
