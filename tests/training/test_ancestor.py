"""A training that begins from another checkpoint's weights carries over what both models have, and records it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.tiny_chain import TinyChain, build_chain

from dalle_cli.clip.train import train_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.data.captions import source_captions
from dalle_cli.data.open_source import open_source
from dalle_cli.dvae.encode import encode_source
from dalle_cli.dvae.train import train_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.checkpoint import Checkpoint, open_checkpoint
from dalle_cli.text.bpe import Tokenizer, train_bpe
from dalle_cli.text.tokenize import tokenize_source

STILL = 1e-12
"""A learning rate that leaves weights as they are."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def still(chain: TinyChain, kind: str, *changes: str) -> Recipe:
    """Return the chain's recipe with one update that changes nothing, from the chain's own ``kind`` of model."""
    folder = getattr(chain.places, kind)
    common = [f"{kind}.init={folder}", f"{kind}.training.updates=1", f"{kind}.learning_rate.peak={STILL}"]
    return load_recipe(chain.recipe_file, [*common, "prior.learning_rate.warmup_updates=0", *changes])


def train(chain: TinyChain, kind: str, recipe: Recipe, out: Path, tokens: Path | None = None) -> Checkpoint:
    source, store = open_source(str(chain.recipe.data.train)), tokens or chain.places.tokens
    if kind == "dvae":
        return train_dvae(recipe, source, out)
    return train_prior(recipe, store, out) if kind == "prior" else train_clip(recipe, source, store, out)


@pytest.mark.parametrize("kind", ["dvae", "prior", "clip"])
def test_a_training_begins_from_the_ema_weights_of_its_ancestor(chain: TinyChain, tmp_path: Path, kind: str) -> None:
    ancestor = open_checkpoint(getattr(chain.places, kind))
    begun = train(chain, kind, still(chain, kind), tmp_path / "run")
    old, new = ancestor.tensors("ema"), begun.tensors("raw")
    assert old.keys() == new.keys()
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, rtol=0, atol=1e-9)
    assert begun.belongs["init"] == ancestor.identity
    assert begun.step == 1
    moments, _ = begun.trainer()
    assert {float(value) for name, value in moments.items() if name.startswith("step.")} == {1.0}


@pytest.fixture(scope="module")
def retokenized(chain: TinyChain, tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    """A run whose tokenizer has fewer merges than the chain's, and whose captions may be longer."""
    places = RunFolders(tmp_path_factory.mktemp("retokenized"))
    recipe = load_recipe(chain.recipe_file, ["tokenizer.vocab_size=270", "tokenizer.text_length=60"])
    source = open_source(str(recipe.data.train))
    tokenizer = train_bpe(source_captions(source), recipe.tokenizer, places.tokenizer)
    tokenize_source(recipe, source, tokenizer, places.tokens)
    encode_source(recipe, source, open_checkpoint(chain.places.dvae), places.tokens)
    return places


@pytest.mark.parametrize("kind", ["prior", "clip"])
def test_embeddings_of_tokens_that_both_tokenizers_have_are_carried_over(
    chain: TinyChain, retokenized: RunFolders, tmp_path: Path, kind: str
) -> None:
    text = ["tokenizer.vocab_size=270", "tokenizer.text_length=60", f"run={retokenized.root}"]
    begun = train(chain, kind, still(chain, kind, *text), tmp_path / "run", retokenized.tokens)
    old, new = open_checkpoint(getattr(chain.places, kind)).tensors("ema"), begun.tensors("raw")
    old_ids = Tokenizer.load(chain.places.tokenizer).backend.get_vocab()
    new_ids = Tokenizer.load(retokenized.tokenizer).backend.get_vocab()
    pairs = [(new_ids[token], old_ids[token]) for token in new_ids if token in old_ids]
    assert len(pairs) > 250
    if kind == "prior":
        tables = {
            "text_embedding": [*pairs, *((270 + p, 300 + p) for p in range(48))],
            "text_position": [(p, p) for p in range(48)],
            "text_head.weight": [*pairs, (270, 300)],
            "text_head.bias": [*pairs, (270, 300)],
        }
        rows = {"text_embedding": 330, "text_position": 60, "text_head.weight": 271, "text_head.bias": 271}
    else:
        tables = {
            "token_embedding.weight": [*pairs, (270, 300)],
            "positional_embedding": [(p, p) for p in range(49)],
        }
        rows = {"token_embedding.weight": 271, "positional_embedding": 61}
    for name, value in old.items():
        if name in tables:
            assert len(new[name]) == rows[name]
            for new_row, old_row in tables[name]:
                torch.testing.assert_close(new[name][new_row], value[old_row], rtol=0, atol=1e-9)
        else:
            torch.testing.assert_close(new[name], value, rtol=0, atol=1e-9)


def test_a_tokenizer_that_is_not_the_ancestors_is_refused(
    chain: TinyChain, retokenized: RunFolders, tmp_path: Path
) -> None:
    copy = RunFolders(tmp_path / "copy")
    shutil.copytree(chain.places.prior, copy.prior)
    shutil.copytree(retokenized.tokenizer, copy.tokenizer)
    text = ["tokenizer.vocab_size=270", "tokenizer.text_length=60", f"run={retokenized.root}"]
    recipe = still(chain, "prior", *text, f"prior.init={copy.prior}")
    with pytest.raises(UserError, match=r"copy/tokenizer: is not the tokenizer .* put that one there"):
        train_prior(recipe, retokenized.tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("dvae", "dvae.model.n_hid=16", "dvae.model.n_hid = 8, the recipe says 16"),
        ("prior", "prior.model.layers=3", "prior.model.layers = 2, the recipe says 3"),
        ("clip", "clip.model.text_width=16", "clip.model.text_width = 8, the recipe says 16"),
    ],
)
def test_an_ancestor_of_other_sizes_is_refused(
    chain: TinyChain, tmp_path: Path, kind: str, change: str, key: str
) -> None:
    with pytest.raises(UserError, match=rf"^{kind}.init: .* was trained with {key}.* leave out {kind}.init"):
        train(chain, kind, still(chain, kind, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_begun_needs_its_ancestor_no_more(chain: TinyChain, tmp_path: Path) -> None:
    ancestor = tmp_path / "ancestor"
    shutil.copytree(chain.places.prior, ancestor)
    changes = [f"prior.init={ancestor}", "prior.training.save_every=1", "prior.learning_rate.schedule=constant"]
    whole = train_prior(load_recipe(chain.recipe_file, changes), chain.places.tokens, tmp_path / "whole")
    first = load_recipe(chain.recipe_file, [*changes, "prior.training.updates=1"])
    train_prior(first, chain.places.tokens, tmp_path / "parts")
    shutil.rmtree(ancestor)
    resumed = train_prior(load_recipe(chain.recipe_file, changes), chain.places.tokens, tmp_path / "parts")
    assert resumed.identity == whole.identity
    assert resumed.belongs["init"] == whole.belongs["init"] == open_checkpoint(chain.places.prior).identity


def test_the_prior_of_an_ancestor_predicts_as_its_ancestor_does(chain: TinyChain, tmp_path: Path) -> None:
    changes = ["prior.training.validate_every=1", "prior.training.ema_decay=0"]
    begun = train_prior(still(chain, "prior", *changes), chain.places.tokens, tmp_path / "run")
    before = open_checkpoint(chain.places.prior)
    assert before.metrics["image"] == pytest.approx(begun.metrics["image"], abs=1e-6)
    assert np.isfinite(begun.metrics["image"])


@pytest.mark.parametrize("kind", ["dvae", "prior", "clip"])
def test_the_command_takes_a_run_and_records_it(chain: TinyChain, tmp_path: Path, call: Call, kind: str) -> None:
    begin = ("--set", f"{kind}.init={chain.places.root}", "--set", f"{kind}.training.updates=1")
    done = call(f"train-{kind}", chain.recipe_file, *begin, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    ancestor = open_checkpoint(getattr(chain.places, kind))
    assert f"begins from {ancestor.path}, which made 2 updates" in done.err
    assert json.loads(call("show", tmp_path / "run", "--json").out)["belongs"]["init"] == ancestor.identity
    nowhere = call(f"train-{kind}", chain.recipe_file, "--set", f"{kind}.init=nowhere", "--out", tmp_path / "other")
    assert "nowhere: holds no checkpoint" in nowhere.mistake()
