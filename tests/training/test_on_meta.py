"""Both passes of each stage, decoding and encoding on the meta device, which knows types and shapes alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.running import smallest_recipe, write_recipe
from torch import Tensor, nn

from dalle_cli.clip.model import clip_text_ids
from dalle_cli.clip.train import ClipTask, build_recipe_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import encoder_input
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, TokenBatch, set_precision
from dalle_cli.randomness import torch_generator
from dalle_cli.sampling.draw import sample_images

META = torch.device("meta")
BATCH, TEXT, SIDE, GRID = 4, 48, 32, 4


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(write_recipe(folder, smallest_recipe(folder, None)), changes)


def on_meta(model: nn.Module) -> Any:
    return model.to(META)


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """Run the backward pass; each parameter gets a gradient of its own shape and type."""
    assert (loss.device, loss.shape) == (META, ())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype), name


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("prior.model.checkpoint_resblocks=true",),
        ("prior.precision=bf16",),
        ("prior.precision=fp16", "prior.model.checkpoint_resblocks=true"),
        ("prior.model.layout=conv, ...",),
    ],
)
def test_the_prior(changes: tuple[str, ...], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *changes)
    model = build_prior(recipe)
    scaling = set_precision(model, recipe.prior, replicas=1)
    if scaling is not None:
        scaling.scales.update(torch.ones(len(scaling.scales), dtype=torch.bool, device=META))
        scaling.assign_scales()
    task = PriorTask.__new__(PriorTask)
    task.recipe, task.model, task.group, task.forward = recipe, on_meta(model), Group(device=META), None
    text, length, image = (torch.zeros(BATCH, *more, dtype=torch.long) for more in ((TEXT,), (), (GRID**2,)))
    check_gradients(model, task.loss((TokenBatch(text, length + 3, image), torch.tensor(12.0)), 0)["loss"])


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("dvae.objective.estimator=reinforce",),
        ("dvae.objective.marginal_kl_weight=10",),
        ("dvae.model.downsampling=4", "prior.model.grid=8"),
    ],
)
def test_the_dvae(changes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.dvae.train.torch_generator", lambda *what, device: torch_generator(*what))
    recipe = recipe_of(tmp_path, *changes)
    model = on_meta(DVAE(recipe.dvae.model))
    task = DvaeTask.__new__(DvaeTask)
    task.recipe, task.model, task.group, task.perceptual, task._replaced = recipe, model, Group(device=META), None, 0.0
    pictures = torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8)
    check_gradients(model, task.loss((0, pictures), 0)["loss"])


@pytest.mark.parametrize("changes", [(), ("clip.objective.caption_negatives=true",)])
def test_clip(changes: tuple[str, ...], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *changes)
    model = on_meta(build_recipe_clip(recipe))
    task = ClipTask.__new__(ClipTask)
    task.recipe, task.model, task.group, task._replaced = recipe, model, Group(device=META), 0.0
    text, length = torch.zeros(BATCH, TEXT, dtype=torch.long), torch.ones(BATCH, dtype=torch.long)
    batch = (
        torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8),
        clip_text_ids(text, length, recipe.tokenizer.vocab_size),
    )
    check_gradients(model, task.loss(batch, 0)["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decoding_steps(precision: Any, tmp_path: Path) -> None:
    prior = on_meta(build_prior(recipe_of(tmp_path))).eval().requires_grad_(False)
    text = torch.zeros(2, TEXT, dtype=torch.long, device=META)
    uniforms = torch.zeros(2, 3, GRID**2, dtype=torch.float64, device=META)
    settings = SamplingSettings(temperature=0.5, top_k=3, top_p=0.9, guidance=3.0)
    tokens, likelihood = sample_images(Decoder(prior, precision), text, uniforms, settings, empty=text[0])
    assert (tokens.device, tokens.dtype, tokens.shape) == (META, torch.int64, (2, 3, GRID**2))
    assert (likelihood.device, likelihood.dtype, likelihood.shape) == (META, torch.float64, (2, 3))


def test_encoding_and_decoding_of_pictures(tmp_path: Path) -> None:
    model = on_meta(DVAE(recipe_of(tmp_path).dvae.model)).eval().requires_grad_(False)
    tokens = model.encode_tokens(encoder_input(torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8, device=META), 0.1))
    assert (tokens.dtype, tokens.shape) == (torch.int64, (BATCH, GRID, GRID))
    mu, ln_b = model.decode_tokens(tokens)
    assert mu.shape == ln_b.shape == (BATCH, 3, SIDE, SIDE)
    assert mu.dtype == ln_b.dtype == torch.float32
