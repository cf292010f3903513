"""Tests of what fits given machines, and of the settings that are suggested where a recipe does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.prior_recipes import tiny_prior

from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.fit import check_fit, suggest_machine, suggest_settings
from dalle_cli.planning.memory import Machines
from dalle_cli.prior.counts import count_parameters

RECIPES = Path(__file__).parents[2] / "recipes"
GB = 10**9


def test_the_largest_prior_fits_the_paper_s_machines() -> None:
    """12e9 parameters fit GPUs of 16 GB with EMA weights and PowerSGD's state on the host, and not without either."""
    machines = Machines(8, 128, 16 * GB)
    recipe = load_recipe(RECIPES / "12b.yaml")
    counts = count_parameters(recipe)
    found = check_fit(recipe, counts, machines)
    assert found.fits
    assert 8 * found.on_host < 100 * GB
    for override in ("prior.training.ema_every=1", "prior.powersgd.offload=none"):
        without = load_recipe(RECIPES / "12b.yaml", [override])
        assert not check_fit(without, counts, machines).fits
    without_both = load_recipe(RECIPES / "12b.yaml", ["prior.training.ema_every=1", "prior.powersgd.offload=none"])
    assert suggest_settings(without_both, counts, machines).settings == {
        "prior.training.ema_every": 25,
        "prior.powersgd.offload": "cpu",
    }


def test_suggested_settings_make_it_fit_and_none_is_idle() -> None:
    recipe = load_recipe(RECIPES / "1b.yaml")
    counts, machines = count_parameters(recipe), Machines(8, 1, 16 * GB)
    assert not check_fit(recipe, counts, machines).fits
    found = suggest_settings(recipe, counts, machines)
    assert found.fit.fits
    assert found.settings
    overrides = [option.removeprefix("--set ") for option in found.options()]
    changed = load_recipe(RECIPES / "1b.yaml", overrides)
    assert check_fit(changed, counts, machines) == found.fit
    for override in overrides:
        fewer = load_recipe(RECIPES / "1b.yaml", [other for other in overrides if other != override])
        assert not check_fit(fewer, counts, machines).fits
    size = changed.prior.training.micro_batch
    assert size is not None
    larger = load_recipe(RECIPES / "1b.yaml", [*overrides, f"prior.training.micro_batch={2 * size}"])
    assert not check_fit(larger, counts, machines).fits


def test_one_small_gpu_is_offered_deepspeed() -> None:
    """8 GB hold neither weights, gradients and moments in 16 bit (9.2 GB) nor what ZeRO 2 leaves with activations."""
    recipe = load_recipe(RECIPES / "1b.yaml")
    counts, machines = count_parameters(recipe), Machines(1, 1, 8 * GB)
    found = suggest_settings(recipe, counts, machines)
    assert found.fit.fits
    assert found.machines == machines
    assert found.settings["prior.sharding.engine"] == "deepspeed"
    assert found.settings["prior.sharding.offload"] == "cpu"
    assert found.fit.on_host >= 16 * counts.total
    overrides = [option.removeprefix("--set ") for option in found.options()]
    assert check_fit(load_recipe(RECIPES / "1b.yaml", overrides), counts, machines) == found.fit
    shipped = load_recipe(RECIPES / "1b-one-gpu.yaml")
    assert check_fit(shipped, counts, machines).fits


def test_larger_machines_are_suggested_where_settings_are_not_enough() -> None:
    recipe = load_recipe(RECIPES / "12b.yaml", ["prior.powersgd.rank=0", "prior.sharding.offload=cpu"])
    counts = count_parameters(recipe)
    found = suggest_settings(recipe, counts, Machines(1, 1, 4 * GB))
    assert found.machines.gpus > 1 or not found.fit.fits
    assert found.settings["prior.training.micro_batch"] == 1
    larger = suggest_machine(recipe, counts, 80 * GB)
    assert larger is not None
    assert larger.fit.fits
    assert larger.machines.nodes == 1


def test_ranks_that_cannot_share_the_batch_or_the_model_are_refused() -> None:
    counts = count_parameters(tiny_prior())
    with pytest.raises(UserError, match="16 samples cannot be shared among 32 processes"):
        check_fit(tiny_prior(), counts, Machines(8, 4, GB))
    with pytest.raises(UserError, match=r"node_size: 4 processes are no multiple of 3"):
        check_fit(tiny_prior(prior__sharding__zero=1, prior__sharding__node_size=3), counts, Machines(4, 1, GB))
    with pytest.raises(UserError, match="16 samples are no multiple of the 3 processes"):
        check_fit(tiny_prior(prior__sharding__zero=1), counts, Machines(3, 1, GB))
