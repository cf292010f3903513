"""The encoder of captions: a store's rows against a slow reference, and the policy for over-long captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from helpers.captions import WORDS, recipe_with
from helpers.running import smallest_recipe
from helpers.text_reference import as_lists, reference_rows, tokenizer, tokens_of
from helpers.untrained import make_untrained, make_untrained_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe, TokenizerSettings
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder
from dalle_cli.text.tokenize import tokenize_source

rows_of_captions = st.lists(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join), max_size=4), min_size=1, max_size=7
)
tokenizer_settings = st.builds(
    TokenizerSettings,
    text_length=st.integers(2, 12),
    dropout=st.sampled_from([0.0, 0.3]),
    overlong=st.sampled_from(["truncate", "refuse"]),
)


@given(rows_of_captions, tokenizer_settings, st.data())
@settings(max_examples=80)
def test_rows_are_the_reference(captions: list[list[str]], config: TokenizerSettings, data: st.DataObject) -> None:
    expected = reference_rows(captions, config)
    encoder = CaptionEncoder(tokenizer(), config)
    found = encoder.rows(captions)
    arrays = found.arrays
    assert tokens_of(arrays["text"], arrays["text_length"]) == [row["text"] for row in expected]
    assert arrays["caption"].tolist() == [row["caption"] for row in expected]
    several = any(len(row["usable"]) > 1 for row in expected)
    assert ("text_epochs" in arrays) == (several and config.dropout == 0)
    assert ("more_captions" in arrays) == several
    if several:
        assert [json.loads(more or "[]") for more in arrays["more_captions"]] == [row["usable"][1:] for row in expected]
    if "text_epochs" in arrays:
        assert arrays["text_versions"].tolist() == [len(row["versions"]) for row in expected]
        for row, wanted in enumerate(expected):
            versions = tokens_of(arrays["text_epochs"][row], arrays["text_epochs_length"][row])
            assert versions == wanted["versions"] + [[]] * (len(versions) - len(wanted["versions"]))
        assert all(array.dtype == np.uint16 for name, array in arrays.items() if name.startswith("text"))
    refused = [bool(given_) and not row["usable"] for given_, row in zip(captions, expected, strict=True)]
    assert [row in found.reasons for row in range(len(refused))] == refused
    assert set(found.reasons.values()) <= {f"caption of more than {config.text_length} tokens"}
    assert found.counts == {
        "captions": sum(len(row["usable"]) for row in expected),
        "overlong": sum(row["overlong"] for row in expected),
    }
    # A row does not depend on the rows beside it.
    cut = data.draw(st.integers(0, len(captions) - 1))
    alone = encoder.rows(captions[cut:])
    for name, array in alone.arrays.items():
        part = arrays[name][cut:]
        assert (part[(slice(None), *map(slice, array.shape[1:]))] == array).all()


def test_captions_for_models_are_padded_and_cut_ones_counted() -> None:
    encoder, short, long = CaptionEncoder(tokenizer(), recipe_with(text_length=4).tokenizer), "a red circle", "a " * 9
    (short_ids, long_ids), captions = as_lists(tokenizer().encode([short, long])), [short, long, short, long]
    assert len(short_ids) < 4 < len(long_ids)
    text, lengths = encoder.encode(captions)
    assert text.dtype == lengths.dtype == np.int64
    assert tokens_of(text, lengths) == [short_ids, long_ids[:4]] * 2
    assert encoder.cut == 2
    encoder.encode([short])
    assert encoder.cut == 2


def test_captions_for_models_are_refused_as_the_recipe_says() -> None:
    encoder = CaptionEncoder(tokenizer(), recipe_with(text_length=4, overlong="refuse").tokenizer)
    assert encoder.encode(["a red circle"])[1].tolist() == [3]
    with pytest.raises(UserError, match=r"the caption 'a a a a a a a a a'... has 9 tokens, the model reads 4"):
        encoder.encode(["a red circle", "a a a a a a a a a"])


# The commands


LENGTH, SHORT, LONG = 8, "a red", "a large red star " * 9


def untrained(folder: Path, overlong: str, **more: Any) -> RunFolders:
    settings = smallest_recipe(folder, None)
    settings["tokenizer"] |= {"text_length": LENGTH, "overlong": overlong}
    recipe = Recipe.model_validate(settings | more)
    places = make_untrained(recipe, folder)
    make_untrained_clip(recipe, places)
    return places


def cut_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if " cut to " in line]


def test_sample_and_rerank_cut_captions_and_say_so_once(call: Call, tmp_path: Path) -> None:
    places = untrained(tmp_path, "truncate")
    drawn = call("sample", places.prior, SHORT, LONG, "--n", 2)
    assert drawn.code == 0, drawn.err
    assert [line["prompt"] for line in drawn.lines] == [SHORT, SHORT, LONG, LONG]
    assert cut_lines(drawn.err) == ["sample: 1 of 2 captions cut to the 8 tokens that the prior reads"]
    file = tmp_path / "samples.jsonl"
    file.write_text(drawn.out)
    ranked = call("rerank", file, "--batch-size", 1)
    assert len(ranked.lines) == 4
    assert cut_lines(ranked.err) == ["rerank: captions cut to the tokens that CLIP reads: 1"]
    short = call("sample", places.prior, SHORT, "--n", 2)
    assert cut_lines(short.err) == []
    file.write_text(short.out)
    assert cut_lines(call("rerank", file).err) == []


def test_sample_and_rerank_refuse_captions_where_the_recipe_does(call: Call, tmp_path: Path) -> None:
    places = untrained(tmp_path, "refuse")
    refused = call("sample", places.prior, SHORT, LONG, "--out", tmp_path / "out").mistake()
    assert f"the caption {LONG[:40]!r}... has " in refused
    assert not (tmp_path / "out").exists()
    drawn = call("sample", places.prior, SHORT, "--n", 1)
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({**drawn.lines[0], "prompt": LONG}))
    assert "the model reads 8 and refuses longer ones (tokenizer.overlong)" in call("rerank", file).mistake()


def test_held_out_captions_and_those_of_a_source_are_drawn_as_training_has_them(call: Call, tmp_path: Path) -> None:
    """Over-long ones are cut, and captions that the recipe's filters refuse are left out."""
    filters = {"filters": {"min_words": 3}, "holdout": 0.5}
    places = untrained(tmp_path / "run", "truncate", data=filters)
    recipe = open_checkpoint(places.prior).recipe()
    data = tmp_path / "data"
    data.mkdir()
    for number, caption in enumerate(["a star", LONG, "a red star", "a blue star"] * 5):
        (data / f"{number:02d}.png").write_bytes(b"never read here")
        (data / f"{number:02d}.txt").write_text(caption)
    source = open_source(str(data))
    tokenize_source(recipe, source, Tokenizer.load(places.tokenizer), places.tokens)
    image, whole = np.zeros((20, 4, 4), np.uint16), np.ones(20, np.uint8)
    with PartWriter(places.tokens, "image", {}, 20) as writer:
        writer.append([source.key(row) for row in range(20)], {"image": image, "image_ok": whole}, {})
        writer.finish()
    held_out = call("sample", places.prior, "--held-out", "--limit", 9, "--n", 1)
    prompts = {line["prompt"] for line in held_out.lines}
    assert LONG.strip() in prompts
    assert "a star" not in prompts
    assert len(cut_lines(held_out.err)) == 1
    first = call("sample", places.prior, "--data", data, "--limit", 9, "--n", 1)
    assert [line["prompt"] for line in first.lines] == [LONG.strip(), "a red star", "a blue star"]
    assert len(cut_lines(first.err)) == 1
    assert call("sample", places.prior, "--captions", data, "--limit", 9, "--n", 1).lines == first.lines
