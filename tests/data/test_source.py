from __future__ import annotations

import pytest

from dalle_cli.data.source import BadSample, clean_caption, split_extension


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/b.c.JPG", ("a/b.c", "jpg")),
        ("a.d/b", ("a.d/b", "")),
        (".png", (".png", "")),
        ("a/.png", ("a/.png", "")),
        ("b.", ("b", "")),
    ],
)
def test_extensions(path: str, parts: tuple[str, str]) -> None:
    assert split_extension(path) == parts


def test_a_word_of_thousands_of_letters_is_no_caption() -> None:
    """BPE needs time quadratic in a word's length, so one damaged caption would hold up all others."""
    assert clean_caption("w" * 5000) == "w" * 5000
    assert clean_caption("word " * 5000) == ("word " * 5000).strip()
    with pytest.raises(BadSample, match=r"a word of more than 5000 letters \(1000000\)"):
        clean_caption("a " + "w" * 1_000_000)
