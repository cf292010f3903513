"""The weights' moving average at every k-th update, against a loop in words, and runs that go on in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.killed_runs import files
from helpers.running import smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from torch import nn

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Adam, LearningRate
from dalle_cli.prior.train import train_prior
from dalle_cli.randomness import torch_generator
from dalle_cli.training.state import TrainingState

DECAY = 0.97


def walk(every: int, dtype: torch.dtype, updates: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights that are moved at random: what they are after each update, and their averages."""
    model = nn.Linear(7, 5, bias=False).to(dtype)
    state = TrainingState(model, set(), Adam(), LearningRate(peak=1.0), ema_every=every)
    weights, averages = [model.weight.detach().float().clone()], [state.ema[0].clone()]
    for step in range(updates):
        with torch.no_grad():
            model.weight.add_(torch.randn(5, 7, generator=torch_generator(0, "walk", step)).to(dtype))
        state.average(DECAY, step)
        weights.append(model.weight.detach().float().clone())
        averages.append(state.ema[0].clone())
    with state.averaged():
        assert torch.equal(model.weight.float(), averages[-1].to(dtype).float())
    assert torch.equal(model.weight.float(), weights[-1])
    return weights, averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3, 25])
def test_an_average_every_few_updates(every: int, dtype: torch.dtype) -> None:
    updates = 80
    weights, averages = walk(every, dtype, updates)
    expected = weights[0].double()
    for done in range(1, updates + 1):
        if done % every == 0:
            keep = 1.0
            for earlier in range(done - every, done):
                keep *= min(DECAY, (1 + earlier) / (10 + earlier))
            expected = keep * expected + (1 - keep) * weights[done].double()
        torch.testing.assert_close(averages[done].double(), expected, rtol=1e-5, atol=1e-5)


def test_far_from_the_start_the_decay_is_a_power() -> None:
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState(model, set(), Adam(), LearningRate(peak=1.0), ema_every=25)
    nn.init.constant_(model.weight, 1.0)
    state.ema[0].zero_()
    state.average(0.999, 99_998)
    assert state.ema[0].item() == 0.0
    state.average(0.999, 99_999)
    assert state.ema[0].item() == pytest.approx(1 - 0.999**25, rel=1e-6)


def settings(folder: Path, **training: Any) -> Path:
    found = smallest_recipe(folder, None)
    found["prior"]["precision"] = "bf16"
    found["prior"]["learning_rate"] = {"peak": 3e-3, "schedule": "plateau"}
    found["prior"]["training"] |= {"updates": 12, "save_every": 4, "keep": 9, "validate_every": 4, **training}
    return write_recipe(folder, found)


@pytest.mark.parametrize("begun", [4, 8])
def test_a_run_that_goes_on_between_two_steps_of_the_average(begun: int, tmp_path: Path) -> None:
    """Begun for as many updates as lie between two steps (of three), and gone on with: the same bytes."""
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    recipe = settings(tmp_path, ema_every=3)
    calm = train_prior(load_recipe(recipe), store, tmp_path / "calm")
    train_prior(load_recipe(recipe, [f"prior.training.updates={begun}"]), store, tmp_path / "parts")
    parts = train_prior(load_recipe(recipe), store, tmp_path / "parts")
    assert files(parts.path) == files(calm.path)
    # Between two steps the average stays what it was, and it is none of the others.
    every = train_prior(load_recipe(recipe, ["prior.training.ema_every=1"]), store, tmp_path / "every")
    name = "resblocks.0.qkv.weight"
    assert torch.equal(every.tensors("raw")[name], calm.tensors("raw")[name])
    assert not torch.equal(every.tensors("ema")[name], calm.tensors("ema")[name])


def test_what_cannot_be_is_refused(tmp_path: Path, call: Call) -> None:
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    recipe = settings(tmp_path)
    start = ("train-prior", recipe, "--tokens", store, "--out", tmp_path / "run")
    done = call(*start, "--set", "prior.training.ema_every=13")
    assert "ema_every 13 is above updates 12" in done.mistake()
    assert not (tmp_path / "run").exists()
    assert call(*start, "--set", "prior.training.updates=4", "--set", "prior.training.ema_every=2").code == 0
    done = call(*start)
    assert "was begun with prior.training.ema_every = 2, the recipe now says 1" in done.mistake()
