"""The training state: EMA weights against naive loops, gradient norms, weight decay, scales and skipped updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import Call
from helpers.killed_runs import files
from helpers.running import smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import DvaeSettings, PriorSettings, Recipe, Training
from dalle_cli.distributed.engine import Replicated
from dalle_cli.precision.gradient_scaling import HIGHEST
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import set_precision, train_prior
from dalle_cli.randomness import torch_generator
from dalle_cli.stores.checkpoint import CheckpointFacts, open_checkpoint, save_checkpoint
from dalle_cli.training.state import TrainingState
from dalle_cli.training.updates import AdamUpdates

# EMA weights


def ema_state(model: nn.Module, decay: float, every: int) -> TrainingState:
    training = Training(updates=100_000, ema_decay=decay, ema_every=every, batch_size=1)
    return TrainingState(Replicated(model), DvaeSettings(training=training), set())


def random_walk(
    decay: float, every: int, dtype: torch.dtype, updates: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Move weights at random; return them and the EMA weights, before the first update and after each."""
    model = nn.Linear(7, 5, bias=False).to(dtype)
    state = ema_state(model, decay, every)
    weights, averages = [model.weight.detach().float().clone()], [state.ema["weight"].clone()]
    for step in range(updates):
        with torch.no_grad():
            model.weight.add_(torch.randn(5, 7, generator=torch_generator(0, "walk", step)).to(dtype))
        state.update_ema(step)
        weights.append(model.weight.detach().float().clone())
        averages.append(state.ema["weight"].clone())
    with state.ema_weights():
        assert torch.equal(model.weight.float(), averages[-1].to(dtype).float())
    assert torch.equal(model.weight.float(), weights[-1])
    return weights, averages


@given(updates=st.integers(1, 30), decay=st.floats(0.0, 0.999))
@settings(max_examples=30)
def test_the_ema_equals_a_naive_loop(updates: int, decay: float) -> None:
    weights, averages = random_walk(decay, 1, torch.float32, updates)
    expected = weights[0].double()
    for step in range(updates):
        keep = min(decay, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weights[step + 1].double()
    torch.testing.assert_close(averages[-1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3, 25])
def test_the_ema_can_be_updated_every_few_updates(every: int, dtype: torch.dtype) -> None:
    decay, updates = 0.97, 80
    weights, averages = random_walk(decay, every, dtype, updates)
    expected = weights[0].double()
    for done in range(1, updates + 1):
        if done % every == 0:
            keep = 1.0
            for earlier in range(done - every, done):
                keep *= min(decay, (1 + earlier) / (10 + earlier))
            expected = keep * expected + (1 - keep) * weights[done].double()
        torch.testing.assert_close(averages[done].double(), expected, rtol=1e-5, atol=1e-5)


def test_long_after_the_start_the_decay_is_a_power() -> None:
    model = nn.Linear(1, 1, bias=False)
    state = ema_state(model, 0.999, 25)
    nn.init.constant_(model.weight, 1.0)
    state.ema["weight"].zero_()
    state.update_ema(99_998)
    assert state.ema["weight"].item() == 0.0
    state.update_ema(99_999)
    assert state.ema["weight"].item() == pytest.approx(1 - 0.999**25, rel=1e-6)


def test_without_a_warm_up_the_decay_is_the_same_from_the_start() -> None:
    model = nn.Linear(1, 1, bias=False)
    training = Training(updates=100, ema_decay=0.9, ema_warmup=False, batch_size=1)
    state = TrainingState(Replicated(model), DvaeSettings(training=training), set())
    nn.init.constant_(model.weight, 1.0)
    state.ema["weight"].zero_()
    for step in range(5):
        state.update_ema(step)
        assert state.ema["weight"].item() == pytest.approx(1 - 0.9 ** (step + 1), rel=1e-6)


def bf16_recipe(folder: Path, **training: Any) -> Path:
    found = smallest_recipe(folder, None)
    found["prior"]["precision"] = "bf16"
    found["prior"]["learning_rate"] = {"peak": 3e-3, "schedule": "plateau"}
    found["prior"]["training"] |= {"updates": 12, "save_every": 4, "keep": 9, "validate_every": 4, **training}
    return write_recipe(folder, found)


@pytest.mark.parametrize("begun", [4, 8])
def test_a_run_resumes_between_two_updates_of_the_ema(begun: int, tmp_path: Path) -> None:
    """A run resumed between two EMA updates, which are three updates apart, ends with the same bytes."""
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    recipe = bf16_recipe(tmp_path, ema_every=3)
    undisturbed = train_prior(load_recipe(recipe), store, tmp_path / "undisturbed")
    train_prior(load_recipe(recipe, [f"prior.training.updates={begun}"]), store, tmp_path / "parts")
    parts = train_prior(load_recipe(recipe), store, tmp_path / "parts")
    assert files(parts.path) == files(undisturbed.path)
    # The raw weights do not depend on the EMA, and the EMA weights do depend on how often it is updated.
    every = train_prior(load_recipe(recipe, ["prior.training.ema_every=1"]), store, tmp_path / "every")
    name = "resblocks.0.qkv.weight"
    assert torch.equal(every.tensors("raw")[name], undisturbed.tensors("raw")[name])
    assert not torch.equal(every.tensors("ema")[name], undisturbed.tensors("ema")[name])


def test_an_ema_that_never_moves_or_changes_is_refused(tmp_path: Path, call: Call) -> None:
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    recipe = bf16_recipe(tmp_path)
    start = ("train-prior", recipe, "--tokens", store, "--out", tmp_path / "run")
    done = call(*start, "--set", "prior.training.ema_every=13")
    assert "ema_every 13 is above updates 12" in done.mistake()
    assert not (tmp_path / "run").exists()
    assert call(*start, "--set", "prior.training.updates=4", "--set", "prior.training.ema_every=2").code == 0
    done = call(*start)
    assert "was begun with prior.training.ema_every = 2, the recipe now says 1" in done.mistake()


# Updates


def test_weight_decay_applies_to_matrices_only() -> None:
    prior = build_prior(Recipe.model_validate(smallest_recipe(Path("unused"), None)))
    optimizer = AdamUpdates(Replicated(prior), set(prior.decayed_parameters()), PriorSettings().adam).adam
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in prior.named_parameters() if id(p) in decayed}
    assert names
    assert all("resblocks" in name and name.endswith("weight") and "norm" not in name for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(prior.parameters()))


@pytest.mark.parametrize("clip_norm", [None, 4.0])
def test_the_logged_norm_is_that_before_clipping(clip_norm: float | None) -> None:
    model = build_prior(Recipe.model_validate(smallest_recipe(Path("unused"), None)))
    stage = PriorSettings()
    stage = stage.model_copy(update={"adam": stage.adam.model_copy(update={"clip_norm": clip_norm})})
    state = TrainingState(Replicated(model), stage, set(model.decayed_parameters()))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    squares = sum(number**2 * p.numel() for number, p in enumerate(model.parameters()))
    assert float(state.optimizer.step(0.0)["grad_norm"]) == pytest.approx(squares**0.5, rel=1e-5)


def test_scales_and_skipped_updates_are_counted_and_saved(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))
    stage = recipe.prior.model_copy(update={"precision": "fp16", "skip": "resblock"})

    def state() -> TrainingState:
        model = build_prior(recipe)
        engine = Replicated(model, scaling=set_precision(model, stage, replicas=1))
        return TrainingState(engine, recipe.prior, set(model.decayed_parameters()))

    def update(state: TrainingState, broken: int | None) -> dict[str, float]:
        parameters = dict(state.engine.model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        if broken is not None:
            parameters[f"resblocks.{broken}.out.weight"].grad[0, 0] = torch.inf  # type: ignore[index]
        return {name: float(value) for name, value in state.optimizer.step(1e-3).items()}

    first = state()
    scaling = cast(Replicated, first.engine).scaling
    assert scaling is not None
    scaling.scales.exponents[2:4] = torch.tensor([HIGHEST, HIGHEST - 1])
    lines = [update(first, broken) for broken in (None, 0, None, 5)]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 2]
    assert [line["skipped"] > 0 for line in lines] == [False, True, False, True]
    assert [line["scales_at_bounds"] for line in lines] == [1, 2, 2, 2]
    assert lines[0]["log2_scale_max"] == 24
    assert lines[0]["log2_scale_min"] == 13
    assert lines[2]["log2_scale_min"] == pytest.approx(13.001 - 0.5)

    saved = tmp_path / "step-00000004"
    save_checkpoint(saved, CheckpointFacts("prior", 4, recipe, {}, {}), first.checkpoint(4))
    second = state()
    second.load_schedules(open_checkpoint(saved))
    second.load(open_checkpoint(saved))
    assert update(second, None)["skipped_updates"] == 2
    assert update(second, 1)["skipped_updates"] == 3
