"""Sizes of a recipe's models, counted on the meta device, without storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dalle_cli.config.layout import KINDS
from dalle_cli.config.odd_settings import TRAINED, odd_settings
from dalle_cli.config.schema import Adam, LearningRate, Recipe, Training

if TYPE_CHECKING:
    from torch import nn

BYTES_16, BYTES_32 = 2, 4
LONGEST_LAYER_LIST = 4
"""Most items of a printed list of layers; the middle of a longer list is left out."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a sample."""

    text: int
    image: int
    total: int


@dataclass(frozen=True, kw_only=True)
class TrainingLength:
    """Length and batch size of a stage's training."""

    updates: int
    batch_size: int
    micro_batch: int | None
    ema_decay: float


@dataclass(frozen=True, kw_only=True)
class Optimization(TrainingLength):
    """Training settings of a stage, with optimizer and learning rate in words."""

    precision: str
    optimizer: str
    schedule: str


@dataclass(frozen=True)
class DvaeParameters:
    """Parameter counts of the dVAE."""

    encoder: int
    decoder: int
    total: int


@dataclass(frozen=True, kw_only=True)
class DvaeSizes(Optimization):
    """Sizes of the dVAE."""

    n_hid: int
    n_init: int
    blocks_per_group: int
    downsampling: int
    codebook_size: int
    codebook_std: float | None
    checkpoint_resblocks: bool
    parameters: DvaeParameters
    estimator: str
    perceptual: dict[str, Any]


@dataclass(frozen=True)
class PriorParameters:
    """Parameter counts of the prior."""

    total: int
    effective: int
    """Parameters in the matrices of the resblocks, 12 d^2 per layer: the count in the paper's table 1."""
    other: int


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the prior's weights in mixed precision."""

    resblock_matrices_16_bit: int
    others_32_bit: int
    total: int
    everything_16_bit: int
    """Bytes if all weights were in 16 bit."""


@dataclass(frozen=True)
class Compression:
    """PowerSGD's rank, and the share of gradients that it saves by the paper's formula."""

    rank: int
    compression: float | None


@dataclass(frozen=True, kw_only=True)
class PriorSizes(Optimization):
    """Sizes of the prior."""

    parameters: PriorParameters
    layers: int
    heads: int
    d_head: int
    d_model: int
    attention: dict[str, str]
    """Layers of each kind of attention, numbered from 1, such as ``2, 6, 10 ... 62``."""
    attention_of_each_layer: list[str]
    attention_as: dict[str, str]
    """Implementation of each kind of attention, in words."""
    cpu_matmul: str
    """Library of 32-bit matrix products on this CPU."""
    weight_bytes: WeightBytes
    sharding: dict[str, Any]
    powersgd: Compression


@dataclass(frozen=True, kw_only=True)
class ClipSizes(TrainingLength):
    """Sizes of the CLIP."""

    embed_dim: int
    vision: str | None
    vision_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    head_width: int


@dataclass(frozen=True)
class RecipeDescription:
    """A recipe's stages, their sizes and settings."""

    what: str = field(default="recipe", init=False)
    name: str
    description: str
    run: str
    seed: int
    image_size: int
    grid: int
    """Image tokens per side."""
    tokens: Tokens
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    dvae: DvaeSizes
    prior: PriorSizes
    clip: ClipSizes
    sampling: dict[str, Any]
    warnings: list[str]
    """A line for each odd setting."""


def describe_recipe(recipe: Recipe) -> RecipeDescription:
    """Return the sizes and settings of a recipe's stages."""
    text, image = recipe.tokenizer.text_length, recipe.grid**2
    return RecipeDescription(
        name=recipe.name,
        description=recipe.description,
        run=recipe.run,
        seed=recipe.seed,
        image_size=recipe.image_size,
        grid=recipe.grid,
        tokens=Tokens(text, image, text + image),
        data=recipe.data.model_dump(),
        tokenizer=recipe.tokenizer.model_dump(),
        dvae=_dvae(recipe),
        prior=_prior(recipe),
        clip=ClipSizes(**recipe.clip.model.model_dump(), **_length(recipe.clip.training)),
        sampling=recipe.sampling.model_dump(),
        warnings=[line for kind in TRAINED for line in odd_settings(recipe, kind)],
    )


def _dvae(recipe: Recipe) -> DvaeSizes:
    # Imported here, since a run or a store is described in a third of the time without torch.
    import torch

    from dalle_cli.dvae.model import DVAE

    stage = recipe.dvae
    with torch.device("meta"):
        model = DVAE(stage.model)
    encoder, decoder = _count(model.encoder), _count(model.decoder)
    return DvaeSizes(
        **stage.model.model_dump(),
        parameters=DvaeParameters(encoder, decoder, encoder + decoder),
        estimator=stage.objective.estimator,
        perceptual=stage.objective.perceptual.model_dump(),
        precision=stage.precision,
        optimizer=_optimizer(stage.adam),
        schedule=_schedule(stage.learning_rate),
        **_length(stage.training),
    )


def _prior(recipe: Recipe) -> PriorSizes:
    from dalle_cli.distributed.compression import paper_compression_rate
    from dalle_cli.distributed.device import matmul_library
    from dalle_cli.prior.attention import describe_attention
    from dalle_cli.prior.counts import count_parameters

    stage, model = recipe.prior, recipe.prior.model
    counts = count_parameters(recipe)
    kinds = model.attention_kinds()
    layers = {kind: [i for i, other in enumerate(kinds, start=1) if other == kind] for kind in KINDS if kind in kinds}
    rank = stage.powersgd.rank
    in_16, in_32 = counts.effective * BYTES_16, counts.other * BYTES_32
    return PriorSizes(
        parameters=PriorParameters(counts.total, counts.effective, counts.other),
        layers=model.layers,
        heads=model.heads,
        d_head=model.d_head,
        d_model=model.d_model,
        attention={kind: format_layers(numbers) for kind, numbers in layers.items()},
        attention_of_each_layer=list(kinds),
        attention_as={
            kind: describe_attention(kind, recipe.tokenizer.text_length, model.grid, model.conv_kernel)
            for kind in layers
        },
        cpu_matmul=matmul_library(),
        weight_bytes=WeightBytes(in_16, in_32, in_16 + in_32, counts.total * BYTES_16),
        precision=stage.precision,
        sharding=stage.sharding.model_dump(),
        powersgd=Compression(rank, paper_compression_rate(model.d_model, rank) if rank else None),
        optimizer=_optimizer(stage.adam),
        schedule=_schedule(stage.learning_rate),
        **_length(stage.training),
    )


def format_layers(numbers: list[int]) -> str:
    """Format ascending layer numbers, such as ``"2, 6, 10 ... 62"``, ``"1, 3-5, 7-9 ... 63"`` or ``"64"``."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and steps != {1}:
        items = [str(number) for number in numbers]
    else:
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        items = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(items) > LONGEST_LAYER_LIST:
        return f"{', '.join(items[: LONGEST_LAYER_LIST - 1])} ... {items[-1]}"
    return ", ".join(items)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _length(training: Training) -> dict[str, Any]:
    return training.model_dump(include={"updates", "batch_size", "micro_batch", "ema_decay"})


def _optimizer(adam: Adam) -> str:
    clip = f", gradient norm clipped at {adam.clip_norm:g}" if adam.clip_norm is not None else ""
    return (
        f"AdamW, betas {adam.beta1:g} and {adam.beta2:g}, eps {adam.eps:g}, "
        f"weight decay {adam.weight_decay:g} on matrices{clip}"
    )


def _schedule(rate: LearningRate) -> str:
    warmup = f"warm-up of {rate.warmup_updates:,} updates to {rate.peak:g}" if rate.warmup_updates else f"{rate.peak:g}"
    if rate.schedule == "constant":
        return f"{warmup}, then constant" if rate.warmup_updates else f"{warmup}, constant"
    if rate.schedule == "cosine":
        end = f"update {rate.decay_updates:,}" if rate.decay_updates is not None else "the last update"
        return f"{warmup}, then a cosine to {rate.final:g} at {end}"
    watched = "training" if rate.plateau_watches == "training" else "held-out"
    most = "" if rate.plateau_halvings is None else f"up to {rate.plateau_halvings} times "
    return f"{warmup}, halved {most}after {rate.plateau_validations} validations without a gain in the {watched} loss"
