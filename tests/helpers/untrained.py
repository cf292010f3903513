"""A chain of untrained models, made in a second, for tests that only draw from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dalle_cli.clip.train import build_recipe_clip
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE
from dalle_cli.prior.model import build_prior
from dalle_cli.stores.checkpoint import (
    CheckpointContent,
    CheckpointFacts,
    Kind,
    open_checkpoint,
    save_checkpoint,
    step_folder,
)
from dalle_cli.text.bpe import Tokenizer, train_bpe

CAPTIONS = ["a small red star above a large blue square", "the exact same shape on the top in blue on the bottom"]


def make_untrained(recipe: Recipe, folder: Path) -> RunFolders:
    """Write the tokenizer, dVAE and prior of ``recipe`` into the run's folder; the prior's weights are random."""
    places = RunFolders(folder)
    tokenizer = train_bpe(CAPTIONS, recipe.tokenizer, places.tokenizer)
    _save(recipe, folder, "dvae", DVAE(recipe.dvae.model, recipe.seed), {})
    belongs = {"tokenizer": tokenizer.identity, "dvae": open_checkpoint(places.dvae).identity}
    prior, generator = build_prior(recipe), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    _save(recipe, folder, "prior", prior, belongs)
    return places


def make_untrained_clip(recipe: Recipe, places: RunFolders) -> None:
    """Write a CLIP with its initial weights beside the tokenizer of ``places``."""
    belongs = {"tokenizer": Tokenizer.load(places.tokenizer).identity}
    _save(recipe, places.root, "clip", build_recipe_clip(recipe), belongs)


def _save(recipe: Recipe, folder: Path, kind: Kind, model: nn.Module, belongs: dict[str, str]) -> None:
    weights = model.state_dict()
    content = CheckpointContent({"raw": weights, "ema": weights}, {}, {})
    save_checkpoint(step_folder(folder / kind, 1), CheckpointFacts(kind, 1, recipe, belongs, {}), content)
