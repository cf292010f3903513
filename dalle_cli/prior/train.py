"""The prior's training (paper, section 2.2 and appendix B) as a task of the shared training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.data.batch_order import WINDOW, BatchOrder, Order
from dalle_cli.data.prefetch import prefetch
from dalle_cli.distributed.device import explain_out_of_memory, fast_matmul, require_precision, use_settings
from dalle_cli.distributed.engine import Engine, Replicated
from dalle_cli.distributed.group import ALONE, Group, join_group
from dalle_cli.errors import UserError
from dalle_cli.precision.formats import DTYPES
from dalle_cli.precision.gradient_scaling import GradientScales, GradientScaling, ScaledBlock
from dalle_cli.prior.counts import count_flops, count_parameters
from dalle_cli.prior.initial import initial_values
from dalle_cli.prior.model import (
    InitialValue,
    LossModule,
    Prior,
    PriorLoss,
    Resblock,
    build_prior,
)
from dalle_cli.progress import log
from dalle_cli.randomness import SPLITMIX_STEP, drawn_below, splitmix64, stream_seed
from dalle_cli.stores.checkpoint import Checkpoint, Kind
from dalle_cli.stores.held_out import VALIDATION_BATCH, split_store
from dalle_cli.stores.places import Place
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.training_captions import TrainingCaptions
from dalle_cli.training.loop import Run
from dalle_cli.training.precision_choice import Update, settle_precision, trial_update
from dalle_cli.training.throughput import SampleWork
from dalle_cli.transfers import send

if TYPE_CHECKING:
    from dalle_cli.distributed.deepspeed_engine import DeepSpeedEngine
    from dalle_cli.distributed.fsdp import Sharded

UNIGRAM_ROWS = 4096
"""Number of training rows that the frequencies of image tokens are counted in."""
PREFETCHED_BATCHES = 8
"""Number of batches that a thread reads at once, and that wait while the model works on earlier ones."""


def train_prior(
    recipe: Recipe,
    store: Place,
    out: Path,
    dvae: Path | None = None,
    extend: int | None = None,
    drawing: Drawing | None = None,
) -> Checkpoint:
    """Train the recipe's prior on a token store, or resume the run in ``out``; return the last update's checkpoint.

    ``dvae`` is the dVAE that encoded the store, or its run; None: the dVAE of the recipe's run. It is read only for
    ``prior.image_embedding: codebook``. ``extend`` is the number of updates to add to a finished run; see ``Run``.
    ``drawing`` makes the pictures of each validation, unless the prior is sharded.

    Raises:
        UserError: the store is unfinished or was made for other sizes than the recipe's or by another dVAE, or the
            recipe's settings do not work together; see also ``Run.train``.
    """
    reader = TokenReader(store, cached_rows=WINDOW)
    reader.require_complete()
    belongs = require_same_sizes(recipe, reader)
    initial = initial_values(recipe, belongs, out, store, dvae)
    with join_group(recipe.device) as group, fast_matmul():
        refuse_unsupported(recipe.prior, group)
        recipe = settle_precision(recipe, "prior", out, group, lambda tried: prior_update(tried, group.device))
        stage = recipe.prior
        require_precision("prior.precision", stage.precision, group.device)
        engine: Engine
        if stage.sharding.engine == "deepspeed":
            engine, prior = deepspeed, _ = deepspeed_prior(recipe, group, initial)
            task = PriorTask(recipe, reader, prior, group, belongs, forward=deepspeed.engine)
        elif stage.sharding.zero and group.size > 1:
            engine, prior = sharded, _ = shard_prior(recipe, group, initial)
            task = PriorTask(recipe, reader, prior, group, belongs, forward=sharded.loss)
        else:
            prior = build_prior(recipe, initial)
            scaling = set_precision(prior, stage, group.size)
            engine = Replicated(prior.to(group.device), group, scaling)
            task = PriorTask(recipe, reader, prior, group, belongs, drawing=drawing)
        if group.device.type == "cuda":
            from dalle_cli.prior.on_gpu import speed_up

            # DeepSpeed gathers parameters inside of resblocks, which breaks the compiled code into untried pieces.
            gathers_inside = stage.sharding.engine == "deepspeed" and stage.sharding.zero == 3
            use_settings(recipe)  # which compiled code depends on
            with explain_out_of_memory(out, task.less_memory):
                speed_up(prior, "off" if gathers_inside else recipe.compile, group.device)
        return Run(task, recipe, out, engine, extend).train()


def prior_update(recipe: Recipe, device: torch.device) -> Update:
    """Return a function that makes an update of a fresh prior on random tokens, for timing."""
    stage, tokenizer = recipe.prior, recipe.tokenizer
    prior = build_prior(recipe)
    engine = Replicated(prior.to(device), Group(device=device), set_precision(prior, stage, 1))
    size = stage.training.batch_size
    text = torch.randint(tokenizer.vocab_size, (size, tokenizer.text_length), device=device)
    length = torch.full((size,), tokenizer.text_length)
    image = torch.randint(recipe.dvae.model.codebook_size, (size, recipe.grid**2), device=device)

    def loss(samples: int) -> Tensor:
        found = prior.loss(text[:samples], length[:samples], image[:samples])
        return found.text + found.image

    return trial_update(recipe, "prior", engine, set(prior.decayed_parameters()), loss)


def require_same_sizes(recipe: Recipe, reader: TokenReader) -> dict[str, str]:
    """Return the hashes of a store's source, tokenizer and dVAE; raise UserError if its sizes are not the recipe's."""
    text, image = reader.part("text").identity, reader.part("image").identity
    sizes = [
        ("prior.model.grid", recipe.prior.model.grid, image["grid"]),
        ("dvae.model.codebook_size", recipe.dvae.model.codebook_size, image["codebook_size"]),
        ("tokenizer.text_length", recipe.tokenizer.text_length, text["text_length"]),
        ("data.views", recipe.data.views, image.get("views", 1)),
    ]
    for name, wanted, found in sizes:
        if wanted != found:
            raise UserError(f"{reader.path}: was made with {name} = {found}, the recipe says {wanted}; make them agree")
    if text["vocab_size"] > recipe.tokenizer.vocab_size:
        raise UserError(
            f"{reader.path}: its tokenizer has {text['vocab_size']} tokens, the recipe's tokenizer.vocab_size is "
            f"{recipe.tokenizer.vocab_size}; make them agree"
        )
    return {"tokenizer": text["tokenizer"], "dvae": image["dvae"], "source": text["source"]}


def refuse_unsupported(stage: PriorSettings, group: Group) -> None:
    """Raise UserError for settings that the ranks of ``group`` do not support, before anything is allocated."""
    sharding, powersgd = stage.sharding, stage.powersgd
    if sharding.engine == "deepspeed":
        from dalle_cli.distributed.deepspeed_engine import refuse_few_stages

        refuse_few_stages(sharding, group.size // (sharding.node_size or group.local_size or group.size))
    elif sharding.offload == "cpu" and group.device.type != "cpu" and (group.size == 1 or not sharding.zero):
        raise UserError(
            "prior.sharding.offload: cpu is for several processes with prior.sharding.zero of 1 to 3; start more "
            "(--gpus), set it to none, or set prior.sharding.engine to deepspeed, which offloads with a single GPU"
        )
    if powersgd.rank and group.size > 1 and not sharding.zero:
        raise UserError(
            "prior.powersgd: compresses the gradients of shards; --set prior.sharding.zero=1 (2, 3) shards them, "
            "--set prior.powersgd.rank=0 sends them whole"
        )


def deepspeed_prior(recipe: Recipe, group: Group, initial: InitialValue | None = None) -> tuple[DeepSpeedEngine, Prior]:
    """Build the recipe's prior in 32 bit for DeepSpeed, which shards it; each rank first holds the whole of it."""
    from dalle_cli.distributed.deepspeed_engine import DeepSpeedEngine, Work
    from dalle_cli.distributed.group import form_nodes

    stage = recipe.prior
    prior = build_prior(recipe, initial)
    if stage.precision != "fp32":
        prior.compute_resblocks_in(DTYPES[stage.precision])
    nodes = form_nodes(group, stage.sharding.node_size)
    log(
        f"train-prior: DeepSpeed's ZeRO stage {stage.sharding.zero} on {nodes.across.size} x {nodes.inside.size} "
        f"ranks, offload {stage.sharding.offload}"
    )
    samples = max(1, stage.training.batch_size // group.size)
    micro_batch = min(stage.training.micro_batch or samples, samples)
    work = Work(micro_batch, -(-samples // micro_batch))
    engine = DeepSpeedEngine(prior, LossModule(prior), nodes, stage, work, recipe.seed)
    return engine, prior


def shard_prior(recipe: Recipe, group: Group, initial: InitialValue | None = None) -> tuple[Sharded, Prior]:
    """Build the recipe's prior in shards, one per rank of a node; no rank ever holds the whole model."""
    from dalle_cli.distributed.fsdp import Sharded
    from dalle_cli.distributed.group import form_nodes

    stage = recipe.prior
    with torch.device("meta"):
        prior = build_prior(recipe, initial)
        if stage.precision != "fp32":
            prior.cast_resblocks(DTYPES[stage.precision])
    nodes = form_nodes(group, stage.sharding.node_size)
    log(f"train-prior: ZeRO stage {stage.sharding.zero} on {nodes.across.size} x {nodes.inside.size} ranks")
    engine = Sharded(prior, LossModule(prior), recipe.seed, nodes, stage.sharding, stage.powersgd)
    engine.scaling = gradient_scaling(engine.blocks, stage, group.size)
    return engine, prior


def set_precision(prior: Prior, stage: PriorSettings, replicas: int) -> GradientScaling | None:
    """Cast the resblocks' matrices of an unsharded prior to their type and return the scaling of its gradients."""
    if stage.precision != "fp32":
        prior.cast_resblocks(DTYPES[stage.precision])
    return gradient_scaling(cast(list[Resblock], list(prior.resblocks)), stage, replicas)


def gradient_scaling(blocks: Sequence[ScaledBlock], stage: PriorSettings, replicas: int) -> GradientScaling | None:
    """Return the scaling of gradients in 16-bit training, or None in 32 bit.

    Float16 has a scale for each of ``blocks``. Bfloat16 has the exponents of float32 and needs no scales, but updates
    with non-finite gradients are skipped all the same.
    """
    if stage.precision == "fp32":
        return None
    if stage.precision == "bf16":
        return GradientScaling([], GradientScales(0))
    return GradientScaling(blocks, GradientScales(len(blocks), replicas), stage.skip, averaged_over=replicas)


@dataclass
class PriorTask:
    """The prior's part in the training loop; ``forward`` computes the loss if ``model`` is sharded."""

    recipe: Recipe
    reader: TokenReader
    model: Prior
    group: Group = ALONE
    belongs: dict[str, str] = field(default_factory=dict)
    kind: Kind = "prior"
    comparable_from: int = 0
    judged_by: str = "image"  # the text's loss rises long before: the same captions come again and again
    less_memory: str = "lower prior.training.micro_batch, or set prior.model.checkpoint_resblocks to true"
    forward: Callable[[Tensor, list[int], Tensor, Tensor, Tensor | None], PriorLoss] | None = None
    drawing: Drawing | None = None

    def __post_init__(self) -> None:
        self.training_rows, self.held_out = split_store(self.reader, self.recipe)
        self.captions = TrainingCaptions(self.reader)

    def work(self) -> SampleWork:
        return sample_work(self.recipe)

    def batches(self, start: int, stop: int, order: Order = "random blocks") -> Iterator[TokenBatch]:
        return prefetch(self._read(start, stop, order), PREFETCHED_BATCHES)

    def _read(self, start: int, stop: int, order_name: Order) -> Iterator[TokenBatch]:
        seed, size, share = self.recipe.seed, self.recipe.prior.training.batch_size, self.recipe.prior.caption_dropout
        noise, codes = self.recipe.prior.token_noise, self.recipe.dvae.model.codebook_size
        part = self.group.part(size)
        places = np.arange(size)[part]
        order = BatchOrder(self.training_rows, size, seed, part, order=order_name)
        for first in range(start, stop, PREFETCHED_BATCHES):
            steps = range(first, min(first + PREFETCHED_BATCHES, stop))
            # Several batches at once, since BPE dropout takes nearly as long for a few captions as for many.
            rows, epochs = map(np.concatenate, zip(*map(order.batch, steps), strict=True))
            block = as_batch(*self.captions.read(rows, epochs), self.reader.epoch_image(rows, epochs))
            for step, batch in zip(steps, block.split(len(block) // len(steps)), strict=True):
                if share:
                    dropped = torch.from_numpy(dropped_captions(seed, step, places, share))
                    batch = replace(batch, length=batch.length.masked_fill(dropped, 0))
                if noise:
                    batch = replace(
                        batch, seen=noisy_tokens(batch.image, seed, step, np.arange(size)[part], noise, codes)
                    )
                yield batch

    def micro_batches(self, batch: TokenBatch, size: int | None) -> list[tuple[Any, float]]:
        # Captions differ in length, and the text's mean is over tokens: each micro-batch divides by its share of the
        # whole batch's count, so that they add up to the whole batch's mean.
        count = self.group.sum(self.model.text_counts(batch.length).sum())
        return self._split(batch, size, count, self.recipe.prior.training.batch_size)

    def loss(self, batch: tuple[TokenBatch, Tensor], step: int) -> dict[str, Tensor]:
        tokens, text_count = batch
        text, image = (send(each, self.group.device) for each in (tokens.text, tokens.image))
        seen = None if tokens.seen is None else send(tokens.seen, self.group.device)
        if self.forward is None:
            found = self.model.loss(text, tokens.length, image, text_count, seen)
        else:
            found = self.forward(text, tokens.length.tolist(), image, text_count, seen)
        weight = self.recipe.prior.objective.text_weight
        return {"loss": weight * found.text + (1 - weight) * found.image, "text": found.text, "image": found.image}

    def validate(self, step: int) -> dict[str, float]:
        """Return the held-out losses; ``image_other_captions`` is the image loss if every image gets another's caption.

        How far ``image`` lies below it is what the prior makes of captions.
        """
        if self.validation is None:
            return {}
        half = len(self.validation) // 2  # neighbours in a data set may have the same caption
        others = replace(
            self.validation, text=self.validation.text.roll(half, 0), length=self.validation.length.roll(half, 0)
        )
        return {
            **self._mean_losses(self.validation, step),
            "image_other_captions": self._mean_losses(others, step)["image"],
            "image_unigram": self.image_unigram,
        }

    def _mean_losses(self, batch: TokenBatch, step: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        count = self.model.text_counts(batch.length).sum()
        training = self.recipe.prior.training
        # Never more at once than in training, whose memory is known to suffice.
        size = min(training.micro_batch or VALIDATION_BATCH, -(-training.batch_size // self.group.size))
        for part, share in self._split(batch, size, count, len(batch)):
            for name, value in self.loss(part, step).items():
                totals[name] = totals.get(name, 0.0) + float(value) * share
        return totals

    def example_images(self) -> dict[str, Tensor]:
        if self.drawing is None or self.validation is None:
            return {}
        try:
            return {"drawings": self.drawing(self.model, self.validation)}
        except torch.OutOfMemoryError:
            log("train-prior: no memory to draw at this validation; lower prior.drawings")
            return {}

    def decayed(self) -> set[str]:
        return set(self.model.decayed_parameters())

    def after_update(self) -> None:
        """Do nothing: the prior's weights are unconstrained."""

    @staticmethod
    def _split(
        batch: TokenBatch, size: int | None, text_count: Tensor, rows: int
    ) -> list[tuple[tuple[TokenBatch, Tensor], float]]:
        """Return micro-batches, each with the divisor of its text loss, and with its share of the whole batch.

        The whole batch of all ranks has ``rows`` samples and ``text_count`` counted text tokens.
        """
        shares, count = [(part, len(part) / rows) for part in batch.split(size or len(batch))], text_count.double()
        return [((part, (count.clamp(min=1) * share).float()), share) for part, share in shares]

    @cached_property
    def image_unigram(self) -> float:
        """Cross-entropy of held-out image tokens under their frequencies in training rows, in nats a token.

        A prior that ignores captions and other image tokens can reach this loss, so a useful one is below it.
        """
        assert self.validation is not None
        spread = np.linspace(0, len(self.training_rows) - 1, min(UNIGRAM_ROWS, len(self.training_rows))).astype(int)
        tokens = self.reader.read("image", self.training_rows.take(spread)).astype(np.int64)
        counts = np.bincount(tokens.ravel(), minlength=self.recipe.dvae.model.codebook_size) + 1.0
        log_share = np.log(counts / counts.sum())
        return float(-log_share[self.validation.image.numpy()].mean())

    @cached_property
    def validation(self) -> TokenBatch | None:
        """The first held-out rows with their whole captions; None if no row is held out."""
        rows = self.held_out[: self.recipe.prior.training.validation_samples]
        return read_tokens(self.reader, rows) if len(rows) else None


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of B captioned images, int64 on the CPU."""

    text: Tensor
    """(B, T) caption tokens; those from ``length`` on are not read."""
    length: Tensor
    """(B,) number of tokens of each caption."""
    image: Tensor
    """(B, S) image tokens in raster order."""
    seen: Tensor | None = None
    """(B, S) the tokens that later ones are predicted from, some of them replaced; None stands for ``image``."""

    def split(self, size: int) -> list[TokenBatch]:
        """Split into batches of ``size`` samples; the last may have fewer."""
        parts = zip(self.text.split(size), self.length.split(size), self.image.split(size), strict=True)
        seen = repeat(None) if self.seen is None else self.seen.split(size)
        return [TokenBatch(*part, own) for part, own in zip(parts, seen, strict=False)]

    def __len__(self) -> int:
        return len(self.text)


Drawing = Callable[[Prior, TokenBatch], Tensor]
"""Draws pictures (3, H, W) uint8 for the first captions of a batch."""


def read_tokens(reader: TokenReader, rows: np.ndarray) -> TokenBatch:
    """Read each first caption, without dropout, and each first view of ``rows`` (B,) of a token store."""
    return as_batch(*(reader.read(name, rows) for name in ("text", "text_length", "image")))


def as_batch(text: np.ndarray, length: np.ndarray, image: np.ndarray) -> TokenBatch:
    """Return a batch of text (B, T), lengths (B,) and image tokens (B, grid, grid)."""
    text_tensor, length_tensor, image_tensor = (
        torch.from_numpy(each.astype(np.int64)) for each in (text, length, image)
    )
    return TokenBatch(text_tensor, length_tensor, image_tensor.flatten(1))


def dropped_captions(seed: int, step: int, indices: np.ndarray, share: float) -> np.ndarray:
    """Draw which samples train with an empty caption, each with probability ``share``, for classifier-free guidance.

    ``indices`` are places in the batch of all ranks; the bool result depends on (seed, step, index) alone.
    """
    stream = np.uint64(stream_seed(seed, "caption-dropout", step))
    drawn = splitmix64(stream + (indices.astype(np.uint64) + np.uint64(1)) * SPLITMIX_STEP)
    return drawn_below(drawn, share)


def noisy_tokens(image: Tensor, seed: int, step: int, indices: np.ndarray, share: float, codes: int) -> Tensor:
    """Return image tokens (B, S), each replaced by one of ``codes`` at random with probability ``share``.

    ``indices`` (B,) are places in the batch of all ranks; a sample's result depends on (seed, step, index) alone.
    """
    stream, positions = np.uint64(stream_seed(seed, "token-noise", step)), image.shape[1]
    places = indices.astype(np.uint64)[:, None] * np.uint64(positions) + np.arange(positions, dtype=np.uint64)
    drawn = splitmix64(stream + (places + np.uint64(1)) * SPLITMIX_STEP)
    noise = (splitmix64(drawn) % np.uint64(codes)).astype(np.int64)
    return torch.where(torch.from_numpy(drawn_below(drawn, share)), torch.from_numpy(noise), image)


def sample_work(recipe: Recipe) -> SampleWork:
    """Return the tokens and FLOPs of a training sample of the recipe's prior."""
    flops = count_flops(recipe, count_parameters(recipe)).model
    return SampleWork(recipe.tokenizer.text_length + recipe.grid**2, float(flops), DTYPES[recipe.prior.precision])
