"""A recipe's sizes, counted on the models it describes; these are built without storage, so the 12e9 one is cheap."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dalle_cli.config.layout import KINDS
from dalle_cli.config.schema import Adam, LearningRate, Recipe, Training
from dalle_cli.distributed.compression import paper_compression
from dalle_cli.distributed.device import fast_matmul
from dalle_cli.dvae.model import DVAE
from dalle_cli.prior.attention import describe_attention
from dalle_cli.prior.model import Prior

BYTES_16, BYTES_32 = 2, 4
_PIECES = 4
"""Pieces of a list of layers that are spelled out; a longer one is shortened in its middle."""


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's stages with their sizes and settings. Counts are of parameters, bytes decimal."""
    text, image = recipe.tokenizer.text_length, recipe.grid**2
    return {
        "what": "recipe",
        "name": recipe.name,
        "description": recipe.description,
        "run": recipe.run,
        "seed": recipe.seed,
        "image_size": recipe.image_size,
        "grid": recipe.grid,
        "tokens": {"text": text, "image": image, "total": text + image},
        "data": recipe.data.model_dump(),
        "tokenizer": recipe.tokenizer.model_dump(),
        "dvae": _dvae(recipe),
        "prior": _prior(recipe),
        "clip": recipe.clip.model.model_dump() | _training(recipe.clip.training),
        "sampling": recipe.sampling.model_dump(),
    }


def _dvae(recipe: Recipe) -> dict[str, Any]:
    stage = recipe.dvae
    with torch.device("meta"):
        model = DVAE(stage.model)
    encoder, decoder = _count(model.encoder), _count(model.decoder)
    return {
        **stage.model.model_dump(),
        "parameters": {"encoder": encoder, "decoder": decoder, "total": encoder + decoder},
        "estimator": stage.objective.estimator,
        "precision": stage.precision,
        "optimizer": _optimizer(stage.adam),
        "schedule": _schedule(stage.learning_rate),
        **_training(stage.training),
    }


def _prior(recipe: Recipe) -> dict[str, Any]:
    stage, model = recipe.prior, recipe.prior.model
    with torch.device("meta"):
        prior = Prior(model, recipe.tokenizer.text_length, recipe.tokenizer.vocab_size, recipe.dvae.model.codebook_size)
    total = _count(prior)
    # What the paper's table of models counts, and what is held in 16 bit: the resblocks' matrices, 12 d^2 a layer.
    matrices = sum(p.numel() for name, p in prior.named_parameters() if name.startswith("resblocks.") and p.ndim == 2)
    kinds = model.attention_kinds()
    layers = {kind: [i for i, own in enumerate(kinds, start=1) if own == kind] for kind in KINDS}
    rank = stage.powersgd.rank
    with fast_matmul() as library:
        pass
    return {
        "parameters": {"total": total, "effective": matrices, "other": total - matrices},
        "layers": model.layers,
        "heads": model.heads,
        "d_head": model.d_head,
        "d_model": model.d_model,
        "attention": {kind: compact(numbers) for kind, numbers in layers.items() if numbers},
        "attention_of_each_layer": list(kinds),
        "attention_as": {
            kind: describe_attention(kind, recipe.tokenizer.text_length, model.grid, model.conv_kernel)
            for kind, numbers in layers.items()
            if numbers
        },
        "cpu_matmul": library,
        "weight_bytes": {
            "resblock_matrices_16_bit": matrices * BYTES_16,
            "others_32_bit": (total - matrices) * BYTES_32,
            "total": matrices * BYTES_16 + (total - matrices) * BYTES_32,
            "everything_16_bit": total * BYTES_16,
        },
        "precision": stage.precision,
        "sharding": stage.sharding.model_dump(),
        "powersgd": {"rank": rank, "compression": paper_compression(model.d_model, rank) if rank else None},
        "optimizer": _optimizer(stage.adam),
        "schedule": _schedule(stage.learning_rate),
        **_training(stage.training),
    }


def compact(numbers: list[int]) -> str:
    """Ascending layer numbers in few words: ``"2, 6, 10 ... 62"``, ``"1, 3-5, 7-9 ... 63"``, ``"64"``."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and steps != {1}:
        pieces = [str(number) for number in numbers]
    else:
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(pieces) > _PIECES:
        return f"{', '.join(pieces[: _PIECES - 1])} ... {pieces[-1]}"
    return ", ".join(pieces)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _training(training: Training) -> dict[str, Any]:
    return {
        "updates": training.updates,
        "batch_size": training.batch_size,
        "micro_batch": training.micro_batch,
        "ema_decay": training.ema_decay,
    }


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
    return f"{warmup}, halved after {rate.plateau_validations} validations without improvement"
