"""Captions and true pictures on the contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.tiny_chain import HELD_OUT, write_recipe

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import DataSettings
from dalle_cli.data.captions import source_captions
from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import open_source
from dalle_cli.report.samples import choose_captions, true_pictures
from dalle_cli.shapes.accuracy import Pool
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.tokenize import tokenize_source


def test_captions_of_the_sheet_are_the_first_of_each_kind() -> None:
    def pool(prompt: str) -> Pool:
        return Pool(prompt, ({},))

    seen = [pool("a large red tee"), *(pool(f"words {i}") for i in range(20))]
    held_out = [pool(HELD_OUT)] * 20
    both = choose_captions(seen + held_out)
    assert len(both) == 12
    assert both == seen[:6] + held_out[:6]
    assert choose_captions(seen) == seen[:12]
    assert choose_captions(held_out) == held_out[:12]
    assert choose_captions(held_out + seen[:2]) == held_out[:10] + seen[:2]


def test_a_true_picture_is_that_of_the_first_row_with_the_caption(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", n=40, test_n=2, seed=0, size=32)
    recipe = load_recipe(write_recipe(tmp_path))
    source = open_source(str(recipe.data.train))
    tokenizer = train_bpe(source_captions(source), recipe.tokenizer, tmp_path / "tokenizer")
    tokenize_source(recipe, source, tokenizer, tmp_path / "tokens.zarr")
    reader = TokenReader(tmp_path / "tokens.zarr")
    captions = reader.strings("caption", range(40))
    found = true_pictures([captions[7].upper(), "a cat"], reader, source, 32, DataSettings())
    assert list(found) == [captions[7].upper()]
    row = captions.index(captions[7])
    np.testing.assert_array_equal(found[captions[7].upper()], np.asarray(decode_image(source.image_bytes(row))))
