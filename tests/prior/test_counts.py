"""Tests of the prior's parameter and FLOP counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.prior_recipes import sized_prior

from dalle_cli.config.load import load_recipe
from dalle_cli.prior.counts import count_flops, count_parameters
from dalle_cli.prior.model import build_prior
from dalle_cli.training.throughput import training_flops

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["1b", "2.8b", "5.6b", "12b"])
def test_parameters_are_those_of_the_model_and_of_the_closed_form(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    counts, model = count_parameters(recipe), recipe.prior.model
    with torch.device("meta"):
        prior = build_prior(recipe)
    assert counts.total == sum(p.numel() for p in prior.parameters())
    assert counts.effective == 12 * model.d_model**2 * model.layers
    # Gain and bias of two norms, and biases of 3d, d, 4d and d.
    assert counts.small == 13 * model.d_model * model.layers


@pytest.mark.parametrize("layout", ["paper", "full, row"])
def test_flops_are_those_that_pytorch_counts(layout: str) -> None:
    recipe = sized_prior(6 if layout == "paper" else 2, 2, 16, 8, 16, 4, prior__model__layout=layout)
    with torch.device("meta"):
        prior = build_prior(recipe)
        text, image = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long)

    def forward() -> None:
        hidden = prior(text, image)
        prior.text_logits(hidden)
        prior.image_logits(hidden)

    found = count_flops(recipe, count_parameters(recipe))
    assert found.model == training_flops(forward)
    assert found.executed == found.model
