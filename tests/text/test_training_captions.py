"""The captions of training: stores of earlier versions, and stores whose tokenizer is missing or another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers.captions import CORPUS, Captions, recipe_with
from helpers.text_reference import tokenizer, tokens_of

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.errors import UserError
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.tokenize import tokenize_source
from dalle_cli.text.training_captions import TrainingCaptions


def test_every_epoch_draws_dropout_anew_and_spells_the_caption(tmp_path: Path) -> None:
    recipe = recipe_with(dropout=0.3, text_length=64)
    tokenize_source(recipe, Captions([["a large red circle"]]), tokenizer(), tmp_path / "t")
    captions, row = TrainingCaptions(TokenReader(tmp_path / "t")), np.array([0])
    drawn = [tokens_of(*captions.read(row, np.array([epoch])))[0] for epoch in range(200)]
    assert {tokenizer().decode(ids).strip() for ids in drawn} == {"a large red circle"}
    assert len(set(map(tuple, drawn))) > 30
    assert drawn[:100] != drawn[100:]


def test_a_store_of_an_earlier_version_gives_its_versions_in_turn(tmp_path: Path) -> None:
    versions = np.array([[[5, 6, 0], [7, 0, 0]], [[8, 9, 4], [3, 2, 0]]], np.uint16)
    arrays = {
        "text": versions[:, 0],
        "text_length": np.array([2, 3], np.uint16),
        "caption": np.array(["one", "two"], dtype=object),
        "text_epochs": versions,
        "text_epochs_length": np.array([[2, 1], [3, 2]], np.uint16),
        "text_versions": np.array([2, 2], np.uint16),
    }
    with PartWriter(tmp_path / "t", "text", {"dropout": 0.1, "dropout_epochs": 2}, 2) as writer:
        writer.append(["a", "b"], arrays, {})
        writer.finish()
    captions = TrainingCaptions(TokenReader(tmp_path / "t"))
    found = tokens_of(*captions.read(np.array([0, 0, 1, 1, 1, 1]), np.array([4, 5, 2, 3, 6, 7])))
    assert [sorted(found[at : at + 2]) for at in (0, 2, 4)] == [[[5, 6], [7]], [[3, 2], [8, 9, 4]], [[3, 2], [8, 9, 4]]]


def test_a_tokenizer_that_is_missing_or_another_is_named(tmp_path: Path) -> None:
    store = tmp_path / "t"
    tokenize_source(recipe_with(dropout=0.3), Captions([["a star"]]), tokenizer(), store)
    other = train_bpe(iter(CORPUS[:5]), recipe_with().tokenizer, tmp_path / "other")
    (store / "tokenizer.json").write_text(other.json)
    reader = TokenReader(store)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the tokenizer that the store was made with"):
        TrainingCaptions(reader)
    (store / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: is missing"):
        TrainingCaptions(reader)


def test_recipes_of_earlier_versions_are_read() -> None:
    assert TokenizerSettings.model_validate({"dropout": 0.2, "dropout_epochs": 8}).dropout == 0.2
    assert TokenizerSettings.model_validate({"dropout": 0.2, "dropout_epochs": 0}).dropout == 0


@pytest.mark.parametrize(("dropout", "versions"), [(0.0, 0), (0.3, 2)])
def test_a_store_of_an_earlier_version_counts_as_made(tmp_path: Path, dropout: float, versions: int) -> None:
    source, recipe, store = Captions([["a star"]] * 3), recipe_with(dropout=dropout), tmp_path / "t"
    tokenize_source(recipe, source, tokenizer(), store)
    group: Any = zarr.open_group(str(store), mode="a", zarr_format=3)
    group.attrs["text"] = {
        **group.attrs["text"], "identity": {**group.attrs["text"]["identity"], "dropout_epochs": versions}
    }  # fmt: skip
    assert tokenize_source(recipe, source, tokenizer(), store).rows == 3
    with pytest.raises(UserError, match=r"was made with dropout "):
        tokenize_source(recipe_with(dropout=0.5), source, tokenizer(), store)


def test_an_unfinished_store_with_stored_dropout_is_refused(tmp_path: Path) -> None:
    identity = {"dropout": 0.3, "source": "s"}
    arrays = {"text": np.zeros((4096, 3), np.uint16)}
    with PartWriter(tmp_path / "t", "text", {**identity, "dropout_epochs": 2}, 5000) as writer:
        writer.append([str(row) for row in range(4096)], arrays, {})
    with pytest.raises(UserError, match="was begun by an earlier version, which stored BPE dropout; choose another"):
        PartWriter(tmp_path / "t", "text", identity, 5000)
