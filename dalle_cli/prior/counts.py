"""Parameter and FLOP counts of the prior, without allocating it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.prior.attention import is_dense, windows_of
from dalle_cli.prior.model import build_prior

BACKWARD = 2
"""FLOPs of a backward pass, in units of the forward pass."""


@dataclass(frozen=True)
class Counts:
    """Sizes of the prior's parameters."""

    matrices: tuple[tuple[int, int], ...]
    """Shapes (out, in) of the resblocks' matrices, in the recipe's precision and compressed by PowerSGD."""
    small: int
    """Size of the resblocks' gains and biases, in 32 bit and replicated on every rank."""
    others: tuple[tuple[int, int], ...]
    """Shapes of the embeddings, unembeddings and the last gain and bias, in 32 bit; a vector has a single column."""

    @property
    def effective(self) -> int:
        """Size of the matrices, 12 d^2 a layer: the number of parameters in the paper's table of models."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def other(self) -> int:
        """Size of everything else."""
        return self.small + sum(rows * columns for rows, columns in self.others)

    @property
    def total(self) -> int:
        return self.effective + self.other


def count_parameters(recipe: Recipe) -> Counts:
    """Count the parameters of the recipe's prior, which is built on the meta device."""
    with torch.device("meta"):
        prior = build_prior(recipe)
    matrices = prior.decayed_parameters()
    rest = {name: p.shape for name, p in prior.named_parameters() if name not in matrices}
    small = sum(shape.numel() for name, shape in rest.items() if name.startswith("resblocks."))
    others = tuple((s[0], s[1:].numel()) for name, s in rest.items() if not name.startswith("resblocks."))
    return Counts(tuple((p.shape[0], p.shape[1]) for p in matrices.values()), small, others)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample; a multiplication and an addition count as two."""

    matrices: int
    """Forward pass through the resblocks' matrices."""
    attention: int
    """Scores and weighted sums of the forward pass, masked entries of dense blocks included."""
    heads: int
    """Forward pass through the unembeddings, at all positions that the loss can count."""
    recomputes: bool
    """True if the backward pass recomputes the resblocks."""

    @property
    def model(self) -> int:
        """FLOPs of training on one sample without recomputation, which MFU counts."""
        return (1 + BACKWARD) * (self.matrices + self.attention + self.heads)

    @property
    def executed(self) -> int:
        """FLOPs of training on one sample, recomputation included."""
        return self.model + (self.matrices + self.attention if self.recomputes else 0)


def count_flops(recipe: Recipe, counts: Counts) -> Flops:
    """Count the FLOPs of one sample of the recipe's prior."""
    model, text, image = recipe.prior.model, recipe.tokenizer.text_length, recipe.grid**2
    length = text + image
    scores = 0
    for kind in model.attention_kinds():
        if is_dense(kind, model.grid):
            scores += length**2
        else:
            scores += length * text + image * windows_of(kind, model.grid, model.conv_kernel).keys
    classes = (text - 1) * (recipe.tokenizer.vocab_size + 1) + image * recipe.dvae.model.codebook_size
    return Flops(
        matrices=2 * counts.effective * length,
        attention=2 * 2 * model.d_model * scores,
        heads=2 * model.d_model * classes,
        recomputes=model.checkpoint_resblocks,
    )
