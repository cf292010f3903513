"""Tests of ``dalle plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dalle_cli.app import app
from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.cost import Assumptions
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.plan import plan

RECIPES = Path(__file__).parents[2] / "recipes"
GB = 10**9


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140"})


def test_json_is_the_whole_plan() -> None:
    machine = ("--gpus-per-node", 8, "--nodes", 128, "--gpu-memory", "16GB", "--interconnect", "100Gbit")
    done = invoke("plan", RECIPES / "12b.yaml", *machine, "--json", "--price", 1.5)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    recipe = load_recipe(RECIPES / "12b.yaml")
    assert found == asdict(plan(recipe, Machines(8, 128, 16 * GB), Assumptions(interconnect=1e11, price=1.5)))
    assert found["parameters"]["effective"] == found["parameters"]["closed_form_effective"] == 12_092_178_432
    assert found["machines"]["processes"] == 1024
    weights = found["memory"]["parts"]["weights"]
    assert weights["whole"] == weights["in_16"] + weights["in_32"]


def test_tables_say_what_the_plan_says() -> None:
    machine = ("--gpus-per-node", 8, "--nodes", 128, "--gpu-memory", "16GB", "--interconnect", "100Gbit")
    done = invoke("plan", RECIPES / "12b.yaml", *machine)
    for expected in (
        "128 x 8 GPUs = 1,024",
        "12.29e9",
        "PowerSGD error buffers",
        "PowerSGD saves",
        "125 TFLOP/s",
        ": fits",
        "every 2,000 updates",
    ):
        assert expected in done.stdout
    table = invoke("plan", RECIPES / "12b.yaml", "--table")
    assert table.exit_code == 0
    assert "85.9%" in table.stdout
    assert "12.09e9" in table.stdout
    (row,) = json.loads(invoke("plan", RECIPES / "12b.yaml", "--table", "--json").stdout)
    assert row["effective_parameters"] == 12_092_178_432


@pytest.mark.parametrize(
    "arguments",
    [
        (RECIPES / "12b.yaml", "--gpus-per-node", 8, "--nodes", 128, "--interconnect", "100Gbit"),
        (RECIPES / "1b-one-gpu.yaml", "--gpus-per-node", 1),
        ("--table",),
    ],
)
def test_rows_of_tables_are_unbroken_at_80_columns(arguments: tuple[object, ...]) -> None:
    def rows(columns: int) -> list[list[str]]:
        shown = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": str(columns)}).stdout
        assert max(len(line) for line in shown.splitlines()) <= columns
        tables = [part for part in shown.split("\n\n") if part.startswith(("Memory that", "Traffic", "Share of"))]
        return [line.split() for table in tables for line in table.splitlines()]

    assert rows(80) == rows(200)
    assert len(rows(80)) > 4


def test_suggested_settings_are_in_the_plan_and_make_it_fit() -> None:
    found = plan(load_recipe(RECIPES / "1b.yaml"), Machines(8, 1, 16 * GB), Assumptions())
    assert not found.memory.fits
    assert found.change is not None
    changed = load_recipe(RECIPES / "1b.yaml", [option.removeprefix("--set ") for option in found.change.set])
    again = plan(changed, Machines(8, 1, 16 * GB), Assumptions())
    assert again.memory.fits
    assert again.change is None
    assert again.memory.peak == found.change.peak


@pytest.mark.parametrize(("memory", "offloads"), [("24GB", False), ("8GB", True)])
def test_one_gpu_is_told_how_to_train_a_billion_parameters(memory: str, offloads: bool) -> None:
    machine = ("--gpus-per-node", 1, "--gpu-memory", memory)
    found = json.loads(invoke("plan", RECIPES / "1b.yaml", *machine, "--json").stdout)
    assert not found["memory"]["fits"]
    assert found["change"]["fits"]
    assert any("engine=deepspeed" in option for option in found["change"]["set"]) == offloads
    words = [word for option in found["change"]["set"] for word in option.split(" ")]
    for option in found["change"]["set"]:
        assert option in invoke("plan", RECIPES / "1b.yaml", *machine).stdout
    then = json.loads(invoke("plan", RECIPES / "1b.yaml", *machine, *words, "--json").stdout)
    assert then["memory"]["fits"]
    assert (then["memory"]["host_a_machine"] > 20 * GB) == offloads


def test_what_training_refuses_is_refused() -> None:
    few = ("--set", "prior.sharding.engine=deepspeed", "--set", "prior.sharding.zero=2", "--nodes", 2)
    done = invoke("plan", RECIPES / "1b.yaml", *few)
    assert isinstance(done.exception, UserError)
    assert "several nodes under DeepSpeed need stage 3, not 2; set 3" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "16"], "--gpu-memory 16: write bytes, such as 16GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB"),
        (["--gpu-memory", "16Gbit"], "--gpu-memory 16Gbit"),
        (["--interconnect", "100GB"], "--interconnect 100GB: write bits a second, such as 100Gbit"),
        (["--interconnect", "-1Gbit"], "--interconnect -1Gbit"),
        (["--disk", "1Gbit"], "--disk 1Gbit: write bytes, such as"),
        (["--share", "1.5"], "--share 1.5: give a number above 0 and up to 1"),
        (["--peak-tflops", "0"], "--peak-tflops 0: give a number above 0"),
        (["--nodes", "1024"], "cannot be shared among 8192 processes"),
    ],
)
def test_bad_values_are_refused(arguments: list[str], said: str) -> None:
    done = invoke("plan", RECIPES / "1b.yaml", *arguments)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_a_plan_without_a_recipe_is_refused() -> None:
    done = invoke("plan", "--nodes", 2)
    assert isinstance(done.exception, UserError)
    assert "name a recipe" in str(done.exception)
    assert invoke("plan", "--gpus-per-node", 0, RECIPES / "1b.yaml").exit_code == 2
