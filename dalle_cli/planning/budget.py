"""A time budget: how many updates of each stage this machine makes in it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_cli.clip.model import contrastive_loss, pixels
from dalle_cli.clip.train import build_recipe_clip
from dalle_cli.config.schema import Recipe
from dalle_cli.data.source import Source
from dalle_cli.distributed.device import choose_device, fast_matmul, prepare_process, use_settings
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.perceptual import PerceptualDistance
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.prior.model import build_prior
from dalle_cli.stores.checkpoint import Kind

SHARES: dict[Kind, float] = {"dvae": 0.55, "prior": 0.39, "clip": 0.06}
"""Share of a budget that each stage gets, found with scripts/bench/quality."""
UPDATES_SHARE = 0.85
"""Share of a stage's time that its updates get; the rest is its start, validations, checkpoints and encoding."""
TIMED_UPDATES = 3
CHECKPOINTS = 8
"""Number of checkpoints, with a validation each, in a training."""


def updates_within(recipe: Recipe, source: Source, minutes: float) -> dict[Kind, int]:
    """Return how many updates of each stage fit into ``minutes`` on this machine, by timing a few.

    Pictures and tokens are random; ``source`` is the one to be trained on.
    """
    seconds = seconds_per_update(recipe, source)
    return {
        kind: max(100, 10 * round(6 * minutes * SHARES[kind] * UPDATES_SHARE / each)) for kind, each in seconds.items()
    }


def seconds_per_update(recipe: Recipe, source: Source) -> dict[Kind, float]:
    """Return the time of an update of each stage on this machine, without loading its data."""
    use_settings(recipe)
    device = choose_device()
    prepare_process(device)
    return {
        "dvae": _timed(*_dvae(recipe, source, device)),
        "prior": _timed(*_prior(recipe, device)),
        "clip": _timed(*_clip(recipe, device)),
    }


def _timed(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    times = []
    for _ in range(1 + TIMED_UPDATES):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if trained[0].device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[TIMED_UPDATES // 2]


def _dvae(recipe: Recipe, source: Source, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = DVAE(recipe.dvae.model).to(memory_format=torch.channels_last).to(device)
    settings = recipe.dvae.objective.perceptual
    distance = PerceptualDistance(settings.network).to(device) if settings.weight else None
    task = DvaeTask(recipe, source, model, Group(device=device), perceptual=distance)
    batch = _random_pictures(recipe, recipe.dvae.training.batch_size)
    return model, lambda: task.loss((0, batch), 0)["loss"]


def _prior(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, size, tokenizer = build_prior(recipe).to(device), recipe.prior.training.batch_size, recipe.tokenizer
    text = torch.randint(tokenizer.vocab_size, (size, tokenizer.text_length), device=device)
    length = torch.full((size,), tokenizer.text_length, device=device)
    image = torch.randint(recipe.dvae.model.codebook_size, (size, recipe.grid**2), device=device)

    def loss() -> Tensor:
        with fast_matmul():
            found = model.loss(text, length, image)
            return found.text + found.image

    return model, loss


def _clip(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, size = build_recipe_clip(recipe).to(device), recipe.clip.training.batch_size
    pictures = _random_pictures(recipe, size).to(device)
    text = torch.randint(recipe.tokenizer.vocab_size, (size, recipe.tokenizer.text_length + 1), device=device)
    text[:, -1] = recipe.tokenizer.vocab_size
    caption_negatives = recipe.clip.objective.caption_negatives
    return model, lambda: contrastive_loss(model, pixels(pictures), text, caption_negatives)


def _random_pictures(recipe: Recipe, count: int) -> Tensor:
    side = recipe.image_size
    return torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
