"""BPE dropout against its definition and against the library's own."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from helpers.captions import CORPUS, WORDS
from helpers.text_reference import MASK, as_lists, mixed, reference_dropout, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from dalle_cli.text.bpe import Tokenizer


def dropped(words: Tokenizer, captions: list[str], p: float, streams: list[int]) -> list[list[int]]:
    ids, numbers = words.encode_words(captions)
    found = words.dropout(p).drop(ids, numbers, np.array(streams, np.uint64))
    return as_lists(found)


captions_of_any_kind = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join),
    st.text(min_size=1, max_size=40),
    st.sampled_from(["ananananananana", "AAAA aaaa AaAa", "it's  two   spaces", "日本語の説明 ١٢٣ é é"]),
)


@given(
    st.lists(captions_of_any_kind, min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, MASK),
)
@settings(max_examples=120)
@example(["circles " * 3 + "c" * 1500, "of " + "triangles" * 113 + "a", "red" * 342], 0.5, 1)
def test_dropout_is_the_slow_definition(captions: list[str], p: float, stream: int) -> None:
    streams = [(stream + n) & MASK for n in range(len(captions))]
    found = dropped(tokenizer(), captions, p, streams)
    assert found == [
        reference_dropout(tokenizer(), caption, p, one) for caption, one in zip(captions, streams, strict=True)
    ]


def test_dropout_has_the_librarys_distribution() -> None:
    """The library's own dropout, which cannot be seeded, as the peer; both are drawn often enough to tell."""
    n, p, text = 20_000, 0.3, "triangles"
    model = json.loads(tokenizer().backend.to_str())["model"]
    peer = Library(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], dropout=p))
    peer.pre_tokenizer = tokenizer().backend.pre_tokenizer
    theirs = Counter(tuple(e.ids) for e in peer.encode_batch([text] * n, add_special_tokens=False))
    ours = Counter(map(tuple, dropped(tokenizer(), [text] * n, p, [mixed(i) for i in range(n)])))
    assert len(ours) > 20
    for outcome in {*ours, *theirs}:
        expected = (ours[outcome] + theirs[outcome]) / 2
        assert abs(ours[outcome] - theirs[outcome]) < 6 * (2 * expected + 1) ** 0.5


def test_what_a_dropped_caption_spells_stays() -> None:
    for caption, ids in zip(CORPUS, dropped(tokenizer(), CORPUS, 0.4, list(range(len(CORPUS)))), strict=True):
        assert tokenizer().decode(ids).strip() == caption
