"""Warnings of settings that a recipe's author hardly meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle_cli.config.load import load_recipe
from dalle_cli.config.odd_settings import TRAINED, odd_settings
from dalle_cli.config.shipped import shipped_recipes
from dalle_cli.views.describe import describe
from dalle_cli.views.describe_recipe import RecipeDescription


def odd(name: str, *settings: str) -> list[str]:
    recipe = load_recipe(Path(name), settings)
    return [line for kind in TRAINED for line in odd_settings(recipe, kind)]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_have_no_odd_settings(name: str) -> None:
    assert odd(name) == []


@pytest.mark.parametrize(
    ("setting", "key", "mend"),
    [
        ("dvae.learning_rate.warmup_updates=9000", "dvae.learning_rate.warmup_updates is 9,000", "never comes to its"),
        ("clip.learning_rate.decay_updates=9000", "clip.learning_rate.decay_updates is 9,000", "cut short"),
        ("dvae.objective.temperature.updates=9000", "dvae.objective.temperature takes 9,000", "updates to 4500"),
        ("dvae.objective.perceptual.enlarged_from=4500", "dvae.objective.perceptual.enlarged_from", "about 3825"),
        ("sampling.guidance=3", "sampling.guidance is 3", "prior.caption_dropout: 0.1"),
    ],
)
def test_a_line_names_the_key_and_the_mend(setting: str, key: str, mend: str) -> None:
    (line,) = odd("quickstart", setting)
    assert line.startswith(key)
    assert mend in line


def test_an_average_longer_than_the_run_is_odd_without_warmup() -> None:
    slow = "prior.training.ema_decay=0.9999"
    assert odd("quickstart", slow) == []
    (line,) = odd("quickstart", slow, "prior.training.ema_warmup=false")
    assert "averages weights over 10,000 updates and the run has 3,600" in line


def test_show_describes_them() -> None:
    found = describe(Path("quickstart"), ["sampling.guidance=3"])
    assert isinstance(found, RecipeDescription)
    assert found.warnings == odd("quickstart", "sampling.guidance=3")
