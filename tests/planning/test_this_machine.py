"""Tests of ``dalle train-prior`` on a machine that is too small, and of its dry run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prior_recipes import tiny_prior
from helpers.running import run, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from typer.testing import CliRunner

from dalle_cli.app import app
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.planning import budget, this_machine
from dalle_cli.planning.this_machine import refuse_too_large
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.stores.row_set import RowSet

RECIPES = Path(__file__).parents[2] / "recipes"
GB = 10**9


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140"})


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine of 25 GB without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(this_machine, "total_memory", lambda _: 25 * GB)


@pytest.mark.usefixtures("small_machine")
def test_the_command_refuses_a_prior_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train-prior", RECIPES / "12b.yaml")
    assert isinstance(done.exception, UserError)
    lines = str(done.exception).splitlines()
    assert len(lines) == 3
    for said in ("recipe 12b", "12.29e9 parameters", "weights 25.0 GB, gradients 25.0 GB, moments 50.0 GB", "25.0 GB"):
        assert said in lines[0]
    assert "it fits a machine with" in lines[1]
    assert "GPUs of 80.0 GB" in lines[1]
    assert "--set prior.training.micro_batch=" in lines[1]
    done = invoke("train-prior", RECIPES / "1b.yaml")
    assert isinstance(done.exception, UserError)
    (suggestion,) = [line for line in str(done.exception).splitlines() if line.startswith("it fits here in ")]
    assert " GB with: --set prior.training.micro_batch=" in suggestion
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_machine")
def test_only_the_command_asks_whether_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "total_memory", lambda _: 1)
    recipe, store = tiny_prior(), write_tokens(tmp_path / "t.zarr", 80, 8, 400, 4, 64)
    with pytest.raises(UserError, match=r"but only 0\.0 GB are available"):
        refuse_too_large(recipe)
    assert train_prior(recipe, store, tmp_path / "run").step == 2


@pytest.mark.usefixtures("small_machine")
def test_the_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    done = invoke("train-prior", RECIPES / "1b.yaml", "--set", "prior.training.micro_batch=1")
    assert isinstance(done.exception, UserError)
    first = str(done.exception).splitlines()[0]
    assert "in each of 8 processes " in first
    assert "only 6.2 GB are available" in first


@pytest.mark.usefixtures("small_machine")
def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    store = write_tokens(tmp_path / "t.zarr", 80, 256, 400, 32, 64)
    before = sorted(tmp_path.rglob("*"))
    small = ("--set", "prior.model.layers=2", "--set", "prior.model.heads=2", "--set", "prior.model.d_model=128")
    fitting = (*small, "--set", "prior.training.micro_batch=1", "--set", "data.holdout=0.25",
               "--set", "dvae.model.codebook_size=64")  # fmt: skip
    start = ("train-prior", RECIPES / "1b.yaml", "--dry-run", "--out", tmp_path / "run")
    held_out = len(split_holdout(RowSet.full(80), 0.25, 0)[1])
    done = invoke(*start, *fitting, "--tokens", store)
    assert done.exit_code == 0, done.output
    assert "Plan for the prior of 1b" in done.stdout
    assert f"{80 - held_out} for training, {held_out} held out" in done.stdout
    assert not re.search("GPU hours|TFLOP/s|MFU", done.stdout)  # nothing is known of a processor's rate
    done = invoke(*start, *fitting, "--tokens", tmp_path / "nowhere.zarr")
    assert done.exit_code == 0
    assert "not there yet" in done.stdout
    # The plan is printed first; then the command ends as a real start would.
    done = invoke(*start, "--tokens", tmp_path / "nowhere.zarr")
    assert isinstance(done.exception, UserError)
    assert "recipe 1b" in str(done.exception)
    assert "DOES NOT FIT" in done.stdout
    done = invoke(*start, *small, "--tokens", store)
    assert isinstance(done.exception, UserError)
    assert "codebook_size = 64, the recipe says 8192" in str(done.exception)
    assert sorted(tmp_path.rglob("*")) == before


# The time on this machine


def test_a_plan_for_this_machine_times_every_stage(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", None))
    found = json.loads(run("plan", recipe, "--here", "--json").out)
    assert found["time"] is None
    assert [stage["kind"] for stage in found["here"]] == ["dvae", "prior", "clip"]
    assert all(stage["seconds"] > 0 and stage["updates"] == 12 for stage in found["here"])
    shown = run("plan", recipe, "--here").out
    assert "Time on this machine" in shown
    assert not re.search("GPU hours|TFLOP/s|MFU", shown)
    assert not (tmp_path / "run").exists()


def test_a_long_update_is_reckoned_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update takes a second, and a tenth of a second for each sample."""
    recipe = tiny_prior(prior__training__batch_size=100)

    def trial(tried: Any) -> Any:
        return 1 + 0.1 * tried.prior.training.batch_size

    monkeypatch.setattr(budget, "_once", lambda seconds: seconds)
    assert budget._reckoned(recipe, "prior", trial) == pytest.approx(11)
    monkeypatch.setattr(budget, "_seconds_of_settled", lambda *_: "measured")
    monkeypatch.setattr(budget, "LONG_UPDATE", 200)
    assert budget._reckoned(recipe, "prior", trial) == "measured"


def test_slower_updates_at_the_end_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update takes 2 seconds, and 3 with enlarged pictures, which are used in the last fifth."""
    objective = {"perceptual": {"weight": 1, "enlarged_from": 80}}
    recipe = Recipe.model_validate(
        {"dvae": {"objective": objective, "training": {"updates": 100, "batch_size": 1}, "precision": "fp32"}}
    )

    def trial(tried: Recipe) -> Any:
        return 2.0 if tried.dvae.objective.perceptual.enlarged_from is None else 3.0

    monkeypatch.setattr(budget, "seconds_of", lambda seconds: seconds)
    assert budget._seconds_of_settled(recipe, "dvae", trial) == pytest.approx(2.2)
    assert budget._seconds_of_settled(recipe, "clip", trial) == 3.0


@pytest.mark.usefixtures("small_machine")
def test_a_prior_that_is_too_large_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(budget, "_reckoned", lambda _recipe, kind, _trial: timed.append(kind) or 1.0)
    for name in ("1b", "12b"):
        done = invoke("plan", RECIPES / f"{name}.yaml", "--here")
        assert done.exit_code == 0, done.output
        assert "too large to be timed here" in done.stdout
    assert timed == ["dvae", "clip"] * 2
