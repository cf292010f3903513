from __future__ import annotations

import pytest

from dalle_cli.data.source import split_extension


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
