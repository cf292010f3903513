"""How long an update of the prior takes and what it costs, from its floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_cli.distributed.memory import Counts
from dalle_cli.prior.attention import is_dense, windows_of
from dalle_cli.recipes.schema import Recipe

BACKWARD = 2
"""Operations of a backward pass, in units of the forward pass."""
HOUR = 3600


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says. By default the paper's GPU, a V100: its data sheet's 125e12 operations a second in 16 bit,
    and a share of them that is a guess until one has measured."""

    peak_flops: float = 125e12
    """Of a GPU, a second."""
    share: float = 0.3
    """Of the peak that training reaches."""
    interconnect: float | None = None
    """Bits a second that a machine's link to the others carries, each way."""
    price: float | None = None
    """Of a GPU for an hour."""
    disk: float = 1e9
    """Bytes a second that a machine writes to where checkpoints go: a guess too."""


def assume(recipe: Recipe, peak_tflops: float | None = None, **given: Any) -> Assumptions:
    """``given``, with the peak named, or else the recipe's, or else the default."""
    peak = peak_tflops or recipe.monitoring.peak_tflops
    return Assumptions(**given) if peak is None else Assumptions(1e12 * peak, **given)


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
