"""Numbers of the prior's parameters and of its floating-point operations, counted without storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.prior.attention import is_dense, windows_of
from dalle_cli.prior.model import build_prior

BACKWARD = 2
"""Operations of a backward pass, in units of the forward pass."""


@dataclass(frozen=True)
class Counts:
    """Numbers of the prior's parameters.

    ``matrices`` are those of the resblocks, (out, in), held in the recipe's precision and compressed by PowerSGD. All
    others are in 32 bit: ``small`` are the resblocks' gains and biases, whole on every process, ``others`` embeddings,
    unembeddings and the last gain.
    """

    matrices: tuple[tuple[int, int], ...]
    small: int
    others: tuple[int, ...]

    @property
    def effective(self) -> int:
        """What the paper's table of models counts: the numbers of the matrices, 12 d^2 a layer."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def other(self) -> int:
        return self.small + sum(self.others)

    @property
    def total(self) -> int:
        return self.effective + self.other


def count_parameters(recipe: Recipe) -> Counts:
    """Counted on the model itself, built without storage."""
    with torch.device("meta"):
        prior = build_prior(recipe)
    matrices = prior.decayed_parameters()
    rest = {name: p.numel() for name, p in prior.named_parameters() if name not in matrices}
    small = sum(number for name, number in rest.items() if name.startswith("resblocks."))
    others = tuple(number for name, number in rest.items() if not name.startswith("resblocks."))
    return Counts(tuple((p.shape[0], p.shape[1]) for p in matrices.values()), small, others)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample: a multiplication and an addition are two."""

    matrices: int
    """Of the resblocks, forward."""
    attention: int
    """Scores and weighted sums, forward, of all that is computed: blocks of queries and windows are dense."""
    heads: int
    """Unembeddings, forward, of all positions that can be counted."""
    recomputes: bool
    """Whether the resblocks run forward once more, for the backward pass."""

    @property
    def model(self) -> int:
        """Of training without what is recomputed: what MFU counts."""
        return (1 + BACKWARD) * (self.matrices + self.attention + self.heads)

    @property
    def done(self) -> int:
        """Of training, all."""
        return self.model + (self.matrices + self.attention if self.recomputes else 0)


def count_flops(recipe: Recipe, counts: Counts) -> Flops:
    """Of one sample of the recipe's prior."""
    model, text, image = recipe.prior.model, recipe.tokenizer.text_length, recipe.grid**2
    length = text + image
    looked_at = 0
    for kind in model.attention_kinds():
        if is_dense(kind, model.grid):
            looked_at += length**2
        else:
            looked_at += length * text + image * windows_of(kind, model.grid, model.conv_kernel).keys
    classes = (text - 1) * (recipe.tokenizer.vocab_size + 1) + image * recipe.dvae.model.codebook_size
    return Flops(
        matrices=2 * counts.effective * length,
        attention=2 * 2 * model.d_model * looked_at,
        heads=2 * model.d_model * classes,
        recomputes=model.checkpoint_resblocks,
    )
