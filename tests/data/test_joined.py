"""Several sources as one: their order, weights, held-out source, and identity."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.pictures import noise, write_sample
from helpers.tiny_chain import write_recipe

from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.captions import source_captions
from dalle_cli.data.open_source import open_source, open_sources
from dalle_cli.dvae.encode import encode_source
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import DvaeTask, train_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.train import PriorTask, train_prior
from dalle_cli.stores.held_out import held_out_captions, split_rows, split_store
from dalle_cli.stores.row_set import RowSet
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.tokenize import tokenize_source

SIZES = {"photographs": 8, "drawings": 5, "others": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        for i in range(size):
            write_sample(root / name, f"{i}", noise(40, 40, i), f"{name} number {i}")
    return {name: root / name for name in SIZES}


def recipe_of(folders: dict[str, Path], folder: Path, *changes: str) -> Recipe:
    train = f"data.train=[{folders['photographs']}, {folders['drawings']}]"
    validation = f"data.validation={folders['others']}"
    return load_recipe(write_recipe(folder), ["data.holdout=0", train, validation, "data.weights=[1, 3]", *changes])


def test_samples_follow_one_another(folders: dict[str, Path]) -> None:
    joined = open_sources([str(folder) for folder in folders.values()])
    assert len(joined) == sum(SIZES.values())
    assert [joined.key(i) for i in (0, 7, 8, 12, 13, 16)] == ["0/0", "0/7", "1/0", "1/4", "2/0", "2/3"]
    assert joined.captions(9) == ["drawings number 1"]
    assert joined.image_bytes(14) == open_source(folders["others"]).image_bytes(1)
    assert joined.image_bytes(-1) == joined.image_bytes(16)
    with pytest.raises(IndexError):
        joined.key(17)
    swapped = open_sources([str(folders[name]) for name in ("drawings", "photographs", "others")])
    assert swapped.identity != joined.identity
    assert open_sources([str(folders["drawings"])]).identity == open_source(folders["drawings"]).identity


def test_a_chain_trains_on_the_weighted_rows_and_validates_on_the_held_out_source(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_of(folders, tmp_path)
    source, places = open_sources(recipe.data.sources), RunFolders(Path(recipe.run))
    tokenizer = train_bpe(source_captions(source), recipe.tokenizer, places.tokenizer)
    tokenize_source(recipe, source, tokenizer, places.tokens)
    dvae = train_dvae(recipe, source, places.dvae)
    encode_source(recipe, source, dvae, places.tokens)
    prior = train_prior(recipe, places.tokens, places.prior)
    assert dvae.metrics["loss"] > 0 or dvae.metrics
    assert "image" in prior.metrics

    training, held_out = split_store(TokenReader(places.tokens), recipe)
    assert Counter(training) == {row: 1 if row < 8 else 3 for row in range(13)}
    assert held_out.tolist() == [13, 14, 15, 16]
    task = DvaeTask(recipe, source, DVAE(recipe.dvae.model))
    assert (list(task.training_rows), task.held_out.tolist()) == (list(training), held_out.tolist())
    assert held_out_captions(places.tokens, recipe, 2) == ["others number 0", "others number 1"]
    prior_task = PriorTask(recipe, TokenReader(places.tokens), None)  # type: ignore[arg-type]
    assert prior_task.held_out.tolist() == held_out.tolist()
    fewer = recipe_of(folders, tmp_path, f"data.train={folders['drawings']}", "data.weights=")
    with pytest.raises(UserError, match=r"was made from 3 sources, the recipe names 2; make them agree"):
        split_store(TokenReader(places.tokens), fewer)


def test_a_weighted_row_counts_its_epochs_by_itself() -> None:
    rows = np.repeat(np.arange(7), [1, 3, 1, 1, 2, 1, 1])
    weights = Counter(rows.tolist())
    order = BatchOrder(rows, 4, seed=2)
    seen: dict[int, list[int]] = {row: [] for row in range(7)}
    for step in range(15):  # six epochs of ten
        for row, epoch in zip(*order.batch(step), strict=True):
            seen[int(row)].append(int(epoch))
    for row, epochs in seen.items():
        assert sorted(epochs) == list(range(6 * weights[row]))
        assert epochs == sorted(epochs)
    again = BatchOrder(rows, 4, seed=2)
    for step in (11, 3, 14):
        np.testing.assert_array_equal(again.batch(step), order.batch(step))


def test_only_training_rows_are_weighted() -> None:
    recipe = Recipe.model_validate({"data": {"train": ["a", "b"], "weights": [2, 1], "holdout": 0.4}})
    training, held_out = split_rows(RowSet.full(10), recipe, [4, 6])
    counts = Counter(training)
    assert all(count == (2 if row < 4 else 1) for row, count in counts.items())
    assert sorted([*counts, *held_out.tolist()]) == list(range(10))
    assert len(set(held_out.tolist())) == len(held_out) > 0


@pytest.mark.parametrize(
    ("data", "mistake"),
    [
        ({"train": []}, "train is an empty list"),
        ({"train": ["a", "b"], "weights": [1]}, "weights has 1 numbers for 2 sources in train; give one for each"),
        (
            {"train": "a", "validation": "b", "holdout": 0.1},
            "validation names the held-out pictures, and holdout is 0.1",
        ),
    ],
)
def test_settings_that_disagree_are_refused(data: dict[str, object], mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake):
        Recipe.model_validate({"data": data})


def test_the_commands_take_a_list_of_sources(folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    recipe = write_recipe(tmp_path)
    changes = {
        "data.train": f"[{folders['photographs']}, {folders['drawings']}]", "data.weights": "[1, 3]",
        "data.validation": folders["others"], "data.holdout": 0,
    }  # fmt: skip
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    for command in ("train-tokenizer", "tokenize-text", "train-dvae"):
        assert call(command, recipe, *words).code == 0, command
    assert json.loads(call("show", tmp_path / "run" / "tokens.zarr", "--json").out)["rows"] == sum(SIZES.values())
    mistake = call("train-dvae", recipe, *words, "--set", "data.weights=[1]").mistake()
    assert "--set data.weights=[1]: data: weights has 1 numbers for 2 sources" in mistake
