"""Captions and true pictures on the contact sheet."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_chain import HELD_OUT, build_chain

from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import open_source
from dalle_cli.report.samples import choose_captions, true_pictures
from dalle_cli.shapes.accuracy import Pool
from dalle_cli.stores.tokens import TokenReader


def test_captions_of_the_sheet_are_the_first_of_each_kind() -> None:
    def pool(prompt: str) -> Pool:
        return Pool(prompt, ({},))

    seen = [pool("a large red tee"), *(pool(f"words {i}") for i in range(20))]
    held = [pool(HELD_OUT)] * 20
    both = choose_captions(seen + held)
    assert len(both) == 12
    assert both == seen[:6] + held[:6]
    assert choose_captions(seen) == seen[:12]
    assert choose_captions(held) == held[:12]
    assert choose_captions(held + seen[:2]) == held[:10] + seen[:2]


def test_a_true_picture_is_that_of_the_first_row_with_the_caption(tmp_path_factory: pytest.TempPathFactory) -> None:
    chain = build_chain(tmp_path_factory.mktemp("chain"))
    reader = TokenReader(chain.places.tokens)
    captions = reader.strings("caption", range(40))
    source = open_source(str(chain.recipe.data.train))
    found = true_pictures([captions[7].upper(), "a cat"], reader, source, 32, 10**6)
    assert list(found) == [captions[7].upper()]
    row = captions.index(captions[7])
    np.testing.assert_array_equal(found[captions[7].upper()], np.asarray(decode_image(source.image_bytes(row))))
