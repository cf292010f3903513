"""Training the prior (paper, section 2.2 and appendix B) as a task of the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import PowerSgd, Recipe, Sharding
from dalle_cli.data.order import WINDOW, BatchOrder
from dalle_cli.data.prefetch import ahead
from dalle_cli.distributed.device import fast_matmul
from dalle_cli.distributed.group import ALONE, Group, join_group
from dalle_cli.errors import UserError
from dalle_cli.precision.gradient_scaling import GradientScales, GradientScaling, ScaledBlock
from dalle_cli.prior.counts import count_flops, count_parameters
from dalle_cli.prior.model import LossModule, Prior, PriorLoss, Resblock, build_prior
from dalle_cli.progress import log
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.stores.checkpoint import Checkpoint, Kind
from dalle_cli.stores.held_out import VALIDATION_BATCH, split_store
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.loop import Run
from dalle_cli.training.throughput import SampleWork

if TYPE_CHECKING:
    from dalle_cli.distributed.fsdp import Sharded

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READ_AHEAD = 8
"""Batches that are read while the model works on earlier ones."""


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


def read_tokens(reader: TokenReader, rows: np.ndarray, epochs: np.ndarray | None) -> TokenBatch:
    """Tokens at ``rows`` with the captions of ``epochs`` (B,); None takes each picture's first caption, undropped."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    image = tensor(reader.read("image", rows)).flatten(1)
    if epochs is None:
        return TokenBatch(tensor(reader.read("text", rows)), tensor(reader.read("text_length", rows)), image)
    text, length = reader.epoch_text(rows, epochs)
    return TokenBatch(tensor(text), tensor(length), image)


def empty_captions(seed: int, step: int, places: np.ndarray, share: float) -> np.ndarray:
    """Which ``places`` of an update's batch learn without their captions, bool: each with chance ``share``, a function
    of (seed, step, place) alone.
    """
    stream = np.uint64(stream_seed(seed, "caption-dropout", step))
    drawn = splitmix64(stream + (places.astype(np.uint64) + np.uint64(1)) * SPLITMIX_STEP)
    below: np.ndarray = (drawn >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    return below


@dataclass
class PriorTask:
    """Cross-entropies of text and image, weighted 1/8 and 7/8; validation on held-out rows, captions whole."""

    recipe: Recipe
    reader: TokenReader
    model: Prior
    group: Group = ALONE
    kind: Kind = "prior"
    less_memory: str = "lower prior.training.micro_batch, or set prior.model.checkpoint_resblocks to true"
    forward: Callable[[Tensor, Tensor, Tensor, float], PriorLoss] | None = None
    """Computes ``model.loss`` where the model is in parts."""

    def __post_init__(self) -> None:
        self.training_rows, self.held_out = split_store(self.reader, self.recipe)

    def work(self) -> SampleWork:
        return sample_work(self.recipe)

    def batches(self, start: int, stop: int) -> Iterator[TokenBatch]:
        return ahead(self._read(start, stop), READ_AHEAD)

    def _read(self, start: int, stop: int) -> Iterator[TokenBatch]:
        seed, size, share = self.recipe.seed, self.recipe.prior.training.batch_size, self.recipe.prior.caption_dropout
        part = self.group.part(size)
        order = BatchOrder(self.training_rows, size, seed, part)
        for step in range(start, stop):
            rows, epochs = order.batch(step)
            batch = read_tokens(self.reader, rows, epochs)
            if share:
                empty = torch.from_numpy(empty_captions(seed, step, np.arange(size)[part], share))
                batch = replace(batch, length=batch.length.masked_fill(empty, 0))
            yield batch

    def micro_batches(self, batch: TokenBatch, size: int | None) -> list[tuple[Any, float]]:
        # The text's mean is over tokens, and captions differ in length: parts divide by the whole batch's count.
        count = self.group.sum(self.model.text_counts(batch.length).sum())
        return self._parts(batch, size, float(count.clamp(min=1)), self.recipe.prior.training.batch_size)

    def loss(self, batch: tuple[TokenBatch, float], step: int) -> dict[str, Tensor]:
        tokens, text_count = batch
        text, length, image = (part.to(self.group.device) for part in (tokens.text, tokens.length, tokens.image))
        found = (self.forward or self.model.loss)(text, length, image, text_count)
        weight = self.recipe.prior.objective.text_weight
        return {"loss": weight * found.text + (1 - weight) * found.image, "text": found.text, "image": found.image}

    def validate(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        totals: dict[str, float] = {}
        count = float(self.model.text_counts(self.validation.length).sum().clamp(min=1))
        size = self.recipe.prior.training.micro_batch or VALIDATION_BATCH
        for part, share in self._parts(self.validation, size, count, len(self.validation)):
            for name, value in self.loss(part, step).items():
                totals[name] = totals.get(name, 0.0) + float(value) * share
        return totals

    def exhibits(self) -> dict[str, Tensor]:
        return {}

    def decayed(self) -> set[str]:
        return set(self.model.decayed_parameters())

    def after_update(self) -> None:
        """The prior's weights are unconstrained."""

    @staticmethod
    def _parts(
        batch: TokenBatch, size: int | None, text_count: float, rows: int
    ) -> list[tuple[tuple[TokenBatch, float], float]]:
        """``batch`` in parts of ``size``, each with its share of a whole of ``rows`` and ``text_count`` tokens."""
        shares = [(part, len(part) / rows) for part in batch.split(size or len(batch))]
        return [((part, text_count * share), share) for part, share in shares]

    @cached_property
    def validation(self) -> TokenBatch | None:
        rows = self.held_out[: self.recipe.prior.training.validation_samples]
        return read_tokens(self.reader, rows, None) if len(rows) else None


def sample_work(recipe: Recipe) -> SampleWork:
    """What a training sample of the recipe's prior takes."""
    flops = count_flops(recipe, count_parameters(recipe)).model
    return SampleWork(recipe.tokenizer.text_length + recipe.grid**2, float(flops), DTYPES[recipe.prior.precision])


def train_prior(recipe: Recipe, store: Path, out: Path) -> Checkpoint:
    """Train the recipe's prior on the token store into the run's folder ``out``; goes on where an earlier run stopped.

    Raises:
        UserError: see ``Run.train``; or the store is unfinished or of
            other sizes than the recipe.
    """
    reader = TokenReader(store, cached_rows=WINDOW)
    reader.require_complete()
    belongs = check_sizes(recipe, reader)
    stage = recipe.prior
    with join_group() as group, fast_matmul():
        refuse_unbuilt(stage.sharding, stage.powersgd, group)
        sharded = None
        if stage.sharding.zero and group.size > 1:
            sharded, prior = sharded_prior(recipe, group)
            scaling = scaling_of(sharded.blocks, stage.precision, group.size)
        else:
            prior = build_prior(recipe)
            scaling = in_16_bit(prior, stage.precision, group.size)
            prior.to(group.device)
        run = Run(
            PriorTask(recipe, reader, prior, group, forward=None if sharded is None else sharded.loss),
            recipe,
            out,
            stage.training,
            stage.adam,
            stage.learning_rate,
            ("seed", "image_size", "data", "tokenizer", "prior"),
            belongs,
            scaling=scaling,
            engine=sharded,
            counters={} if sharded is None else sharded.counters(),
        )
        return run.train()


def sharded_prior(recipe: Recipe, group: Group) -> tuple[Sharded, Prior]:
    """The recipe's prior in parts, one for each process of a node; nowhere is it whole."""
    from dalle_cli.distributed.fsdp import Sharded
    from dalle_cli.distributed.group import form_nodes

    stage = recipe.prior
    with torch.device("meta"):
        prior = build_prior(recipe)
        if stage.precision != "fp32":
            prior.cast_resblocks(DTYPES[stage.precision])
    nodes = form_nodes(group, stage.sharding.node_size)
    log(f"train-prior: ZeRO stage {stage.sharding.zero} on {nodes.across.size} x {nodes.inside.size} processes")
    engine = Sharded(prior, LossModule(prior), recipe.seed, group, nodes, stage.sharding, stage.powersgd)
    return engine, prior


def in_16_bit(prior: Prior, precision: Precision, replicas: int) -> GradientScaling | None:
    """Put the resblocks' matrices into 16 bit, and scale their gradients where they could underflow."""
    if precision != "fp32":
        prior.cast_resblocks(DTYPES[precision])
    return scaling_of(cast(list[Resblock], list(prior.resblocks)), precision, replicas)


def scaling_of(blocks: Sequence[ScaledBlock], precision: Precision, replicas: int) -> GradientScaling | None:
    """How the gradients of ``blocks`` are scaled: bfloat16 has float32's exponents and needs no scales."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return GradientScaling([], GradientScales(0))
    return GradientScaling(blocks, GradientScales(len(blocks), replicas))


def load_prior(checkpoint: Checkpoint) -> Prior:
    """The prior of a checkpoint (its EMA weights), ready for sampling."""
    with torch.device("meta"):
        model = build_prior(checkpoint.recipe())
    model.load_state_dict(checkpoint.tensors("ema"), assign=True)
    return model.eval().requires_grad_(False)


def refuse_unbuilt(sharding: Sharding, powersgd: PowerSgd, group: Group) -> None:
    """Refuse what a recipe can say and this version cannot do, before anything is allocated.

    Raises:
        UserError: naming the key and the mend.
    """
    if sharding.offload == "cpu" and group.device.type != "cpu" and (group.size == 1 or not sharding.zero):
        raise UserError(
            "prior.sharding.offload: cpu is for several processes with prior.sharding.zero of 1 to 3; set it to none, "
            "or start more processes (--gpus)"
        )
    if powersgd.rank and group.size > 1 and not sharding.zero:
        raise UserError(
            "prior.powersgd: compresses the gradients of shards; --set prior.sharding.zero=1 (2, 3) shards them, "
            "--set prior.powersgd.rank=0 sends them whole"
        )


def check_sizes(recipe: Recipe, reader: TokenReader) -> dict[str, str]:
    """The hashes of the tokenizer and the dVAE that the store was made with.

    Raises:
        UserError: it was made for other sizes than the recipe's.
    """
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
