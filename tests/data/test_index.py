from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.data.index import HASH_BYTES, PackedStrings, group_by_hash, hash_string


@given(st.lists(st.integers(0, 6), max_size=40))
def test_groups_of_equal_items(values: list[int]) -> None:
    items, begins = group_by_hash(b"".join(hash_string(str(value)) for value in values))
    expected: dict[int, list[int]] = {}
    for i, value in enumerate(values):
        expected.setdefault(value, []).append(i)
    assert [items[a:b].tolist() for a, b in pairwise(begins)] == list(expected.values())


def test_hashes_tell_strings_apart() -> None:
    assert len({hash_string(f"{a}/{b}") for a in range(100) for b in range(100)}) == 10_000
    assert len(hash_string("\udcff")) == HASH_BYTES


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8)))
def test_strings_are_a_list_of_strings(strings: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[i] for i in range(len(packed))] == strings
    assert [packed[i - len(packed)] for i in range(len(packed))] == strings
    with pytest.raises(IndexError):
        packed[len(packed)]
