"""Training the prior (paper, section 2.2 and appendix B) as a task of the one training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.errors import UserError
from dalle_cli.prior.transformer import Prior
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.checkpoint import Checkpoint, Kind
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.held_out import split_store
from dalle_cli.training.loop import Run
from dalle_cli.training.order import BatchOrder

VALIDATION_BATCH = 64


@dataclass(frozen=True)
class TokenBatch:
    """Captions (B, T) int64 with their lengths (B,), and images (B, grid * grid) int64 in raster order."""

    text: Tensor
    length: Tensor
    image: Tensor

    def split(self, size: int) -> list[TokenBatch]:
        """The batch in parts of ``size`` samples."""
        parts = zip(self.text.split(size), self.length.split(size), self.image.split(size), strict=True)
        return [TokenBatch(*part) for part in parts]

    def __len__(self) -> int:
        return len(self.text)


def read_tokens(reader: TokenReader, rows: np.ndarray, versions: np.ndarray | None) -> TokenBatch:
    """Tokens at ``rows``; ``versions`` (B,) choose among the BPE-dropped captions, None takes the captions whole."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    image = tensor(reader.read("image", rows)).flatten(1)
    if versions is None:
        return TokenBatch(tensor(reader.read("text", rows)), tensor(reader.read("text_length", rows)), image)
    at = np.arange(len(rows))
    text = reader.read("text_dropped", rows)[at, versions]
    length = reader.read("text_dropped_length", rows)[at, versions]
    return TokenBatch(tensor(text), tensor(length), image)


@dataclass
class PriorTask:
    """Cross-entropies of text and image, weighted 1/8 and 7/8; validation on held-out rows, captions whole."""

    recipe: Recipe
    reader: TokenReader
    model: Prior
    kind: Kind = "prior"

    def __post_init__(self) -> None:
        self.training_rows, self.held_out = split_store(self.reader, self.recipe)

    def batches(self, start: int, stop: int) -> Iterator[TokenBatch]:
        order = BatchOrder(self.training_rows, self.recipe.prior.training.batch_size, self.recipe.seed)
        dropped = self.reader.dropped_versions
        for step in range(start, stop):
            rows, epochs = order.batch(step)
            yield read_tokens(self.reader, rows, epochs % dropped if dropped else None)

    def micro_batches(self, batch: TokenBatch, size: int | None) -> list[tuple[Any, float]]:
        # The text's mean is over tokens, and captions differ in length: parts divide by the whole batch's count.
        count = float(self.model.text_counts(batch.length).sum().clamp(min=1))
        shares = [(part, len(part) / len(batch)) for part in batch.split(size or len(batch))]
        return [((part, count * share), share) for part, share in shares]

    def loss(self, batch: tuple[TokenBatch, float], step: int) -> dict[str, Tensor]:
        tokens, text_count = batch
        found = self.model.loss(tokens.text, tokens.length, tokens.image, text_count)
        weight = self.recipe.prior.objective.text_weight
        return {"loss": weight * found.text + (1 - weight) * found.image, "text": found.text, "image": found.image}

    def validate(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        totals: dict[str, float] = {}
        for part, share in self.micro_batches(self.validation, VALIDATION_BATCH):
            for name, value in self.loss(part, step).items():
                totals[name] = totals.get(name, 0.0) + float(value) * share
        return totals

    def decayed(self) -> set[str]:
        return set(self.model.decayed_parameters())

    def after_update(self) -> None:
        """The prior's weights are unconstrained."""

    @cached_property
    def validation(self) -> TokenBatch | None:
        rows = self.held_out[: self.recipe.prior.training.validation_samples]
        return read_tokens(self.reader, rows, None) if len(rows) else None


def build_prior(recipe: Recipe) -> Prior:
    """The recipe's prior with its initial weights, or without storage inside ``torch.device("meta")``."""
    return Prior(
        recipe.prior.model,
        text_length=recipe.tokenizer.text_length,
        text_vocab=recipe.tokenizer.vocab_size,
        image_vocab=recipe.dvae.model.codebook_size,
        seed=recipe.seed,
    )


def train_prior(recipe: Recipe, store: Path, out: Path) -> Checkpoint:
    """Train the recipe's prior on the token store into the run's folder ``out``; goes on where an earlier run stopped.

    Raises:
        UserError: see ``Run.train``; or the store is unfinished or of other sizes than the recipe.
    """
    refuse_unbuilt(recipe)
    reader = TokenReader(store)
    reader.require_complete()
    belongs = _check_sizes(recipe, reader)
    stage = recipe.prior
    run = Run(
        PriorTask(recipe, reader, build_prior(recipe)),
        recipe,
        out,
        stage.training,
        stage.adam,
        stage.learning_rate,
        ("seed", "image_size", "data", "tokenizer", "prior"),
        belongs,
    )
    return run.train()


def load_prior(checkpoint: Checkpoint) -> Prior:
    """The prior of a checkpoint (its EMA weights), ready for sampling."""
    with torch.device("meta"):
        model = build_prior(checkpoint.recipe())
    model.load_state_dict(checkpoint.tensors("ema"), assign=True)
    return model.eval().requires_grad_(False)


def refuse_unbuilt(recipe: Recipe) -> None:
    """Refuse what a recipe can say and this version cannot do yet, before anything is allocated."""
    stage = recipe.prior
    if stage.precision != "fp32":
        raise UserError(f"prior.precision: {stage.precision} training is not built yet; --set prior.precision=fp32")
    if stage.sharding.zero or stage.sharding.offload != "none":
        raise UserError("prior.sharding: ZeRO is not built yet; --set prior.sharding.zero=0 trains in one process")
    if stage.powersgd.rank:
        raise UserError("prior.powersgd: PowerSGD is not built yet; --set prior.powersgd.rank=0 trains in one process")


def _check_sizes(recipe: Recipe, reader: TokenReader) -> dict[str, str]:
    text, image = reader.part("text")["identity"], reader.part("image")["identity"]
    facts = [
        ("prior.model.grid", recipe.prior.model.grid, image["grid"]),
        ("dvae.model.codebook_size", recipe.dvae.model.codebook_size, image["codebook_size"]),
        ("tokenizer.text_length", recipe.tokenizer.text_length, text["text_length"]),
    ]
    for name, wanted, found in facts:
        if wanted != found:
            raise UserError(f"{reader.path}: was made with {name} = {found}, the recipe says {wanted}; make them agree")
    if text["vocab_size"] > recipe.tokenizer.vocab_size:
        raise UserError(
            f"{reader.path}: its tokenizer has {text['vocab_size']} tokens, the recipe's tokenizer.vocab_size is "
            f"{recipe.tokenizer.vocab_size}; make them agree"
        )
    return {"tokenizer": text["tokenizer"], "dvae": image["dvae"]}
