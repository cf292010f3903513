"""Shipped recipes are found by name, and settings are filled into a recipe's text without touching the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.running import run

from dalle_cli.config.load import load_recipe
from dalle_cli.config.shipped import shipped_recipe, shipped_recipes, with_values
from dalle_cli.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
VALUES: dict[str, Any] = {
    "name": "two words: and a colon",
    "data.train": "data/{00..11}.tar",
    "data.crop": True,
    "tokenizer.vocab_size": 512,
    "dvae.objective.temperature.updates": 123456,
    "dvae.training.updates": 7,
    "sampling.n": 4,
}


def test_every_shipped_recipe_loads_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {file.stem for file in RECIPES.glob("*.yaml")}
    assert set(shipped_recipes()) == names
    wanted = {name: load_recipe(RECIPES / f"{name}.yaml") for name in names}
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert load_recipe(Path(name)) == load_recipe(Path(f"{name}.yaml")) == wanted[name]
    assert shipped_recipe("none") is None
    with pytest.raises(UserError, match=r"none.yaml: no such recipe; there are 12b, .*quickstart"):
        load_recipe(Path("none.yaml"))
    Path("mine.yml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"mine.yaml: no such recipe; did you mean mine.yml\?"):
        load_recipe(Path("mine.yaml"))


def test_a_recipe_may_extend_a_shipped_one_and_a_file_beside_it_comes_first(tmp_path: Path) -> None:
    child = tmp_path / "mine.yaml"
    child.write_text("extends: 12b.yaml\nseed: 5\n")
    assert load_recipe(child) == load_recipe(RECIPES / "12b.yaml").model_copy(update={"seed": 5})
    (tmp_path / "12b.yaml").write_text("name: beside\n")
    assert load_recipe(child).name == "beside"


def test_filling_in_changes_the_named_values_and_nothing_else() -> None:
    text = (RECIPES / "own-data.yaml").read_text()
    filled = with_values(text, VALUES)
    wanted = yaml.safe_load(text)
    for key, value in VALUES.items():
        block = wanted
        *parents, last = key.split(".")
        for name in parents:
            block = block[name]
        assert last in block
        block[last] = value
    assert yaml.safe_load(filled) == wanted
    assert re.findall("#.*", filled) == re.findall("#.*", text)
    assert filled.count("\n") == text.count("\n")
    with pytest.raises(KeyError):
        with_values(text, {"dvae.training": 1})
    with pytest.raises(KeyError):
        with_values(text, {"dvae.training.patience": 1})


def test_comments_stay_in_their_column_where_the_value_leaves_room() -> None:
    text = "a: 1      # one\nb: {c: 22, d: 3}   # two\n"
    assert with_values(text, {"a": 1000, "b.c": 5}) == "a: 1000   # one\nb: {c: 5, d: 3}    # two\n"
    assert with_values(text, {"a": "long enough"}).startswith("a: long enough  # one\n")


def test_sizes_that_are_left_out_follow_from_others(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("image_size: 96\ndvae: {model: {downsampling: 4}}\nprior: {model: {heads: 3, d_head: 8}}\n")
    assert load_recipe(file).prior.model.grid == 24
    assert load_recipe(file).prior.model.d_model == 24
    assert load_recipe(file, ["image_size=64"]).prior.model.grid == 16
    with pytest.raises(UserError, match=r"set prior\.model\.grid: 24"):
        load_recipe(file, ["prior.model.grid=12"])
    with pytest.raises(UserError, match=r"image_size: .*, not 'large'"):
        load_recipe(file, ["image_size=large"])


def test_show_prints_every_setting_and_the_schema(tmp_path: Path) -> None:
    shown = run("show", "own-data", "--yaml", "--set", "seed=3")
    assert shown.code == 0, shown.err
    file = tmp_path / "all.yaml"
    file.write_text(shown.out)
    assert load_recipe(file) == load_recipe(RECIPES / "own-data.yaml", ["seed=3"])
    schema = yaml.safe_load(run("show", "--schema").out)
    assert schema["properties"]["prior"]["$ref"].endswith("/PriorSettings")
    assert "name a recipe" in run("show", "--json").mistake()
