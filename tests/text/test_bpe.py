"""The BPE tokenizer: captions to tokens and back."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from helpers.captions import CORPUS
from helpers.text_reference import as_lists, tokenizer
from tokenizers import Tokenizer as Library

from dalle_cli.text import bpe
from dalle_cli.text.bpe import Tokenizer


def test_captions_are_lower_cased_and_composed() -> None:
    plain, other = as_lists(tokenizer().encode(["a red café", "A RED cafe\u0301"]))
    assert plain == other
    assert tokenizer().decode(plain).strip() == "a red café"


def test_what_a_file_says_of_cutting_padding_and_dropout_is_left_aside(tmp_path: Path) -> None:
    spoiled = Library.from_str(tokenizer().backend.to_str())
    spoiled.enable_truncation(3)
    spoiled.enable_padding(length=3)
    spoiled.model.dropout = 0.5
    spoiled.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert as_lists(loaded.encode(CORPUS[:20])) == as_lists(tokenizer().encode(CORPUS[:20]))
    assert as_lists(loaded.encode_words(CORPUS[:20])[0]) == as_lists(tokenizer().encode(CORPUS[:20]))


def test_captions_encoded_part_by_part_are_the_same() -> None:
    words = tokenizer()
    ids, (again, numbers) = words.encode(CORPUS), words.encode_words(CORPUS)
    with mock.patch.object(bpe, "ENCODED_AT_ONCE", 3):
        for found in (words.encode(CORPUS), words.encode_words(CORPUS)[0], again):
            assert found.values.tolist() == ids.values.tolist()
            assert found.counts.tolist() == ids.counts.tolist()
        assert words.encode_words(CORPUS)[1].tolist() == numbers.tolist()
    assert len(words.encode([]).values) == 0
