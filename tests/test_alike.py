"""Batches of pictures that are alike: neighbours against a search by hand, and the order that training takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import write_tokens

from dalle_cli.clip.alike import AMONG, AlikePictures, neighbours_together
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.order import BatchOrder

CONTENTS, TOGETHER = 7, 4


@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_each_takes_its_nearest_of_those_that_are_left(n: int, width: int, together: int, seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 9, (n, width))
    order = neighbours_together(points.astype(np.float32), together).tolist()
    assert sorted(order) == list(range(n))

    def distances(first: int, others: list[int]) -> list[int]:
        return sorted(int(((points[first] - points[other]) ** 2).sum()) for other in others)

    left = list(range(n))
    for at in range(0, n, together):
        first, *others = order[at : at + together]
        assert first == left[0]
        assert distances(first, others) == distances(first, left[1:])[: len(others)]
        left = [place for place in left if place not in order[at : at + together]]


def test_batches_hold_pictures_of_the_same_codes(tmp_path: Path) -> None:
    # Each picture consists of one code, its caption's first token.
    reader = TokenReader(write_tokens(tmp_path / "tokens", 1000, 3, CONTENTS, 4, 16))
    code = reader.read("image", np.arange(1000))[:, 0, 0]
    rows = np.arange(100, 1000)

    def epoch(seed: int) -> np.ndarray:
        order = BatchOrder(rows, len(rows), seed, arrange=AlikePictures(reader, TOGETHER))
        return order.batch(0)[0]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert sorted(first) == sorted(other) == rows.tolist()
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    kinds = [len(set(code[group])) for group in first.reshape(-1, TOGETHER)]
    # Of each content but for its last three at most, which go with others' last.
    assert sum(kind > 1 for kind in kinds) <= CONTENTS
    plain = BatchOrder(rows, len(rows), 0).batch(0)[0]
    assert np.mean([len(set(code[group])) for group in plain.reshape(-1, TOGETHER)]) > 2.5
    # Groups are in random order: neighbours among them are of other contents.
    assert np.mean(code[first[::TOGETHER]][1:] == code[first[::TOGETHER]][:-1]) < 0.3


def test_more_pictures_than_are_compared_at_once_all_come(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).permutation(AMONG + 7)
    reader = TokenReader(write_tokens(tmp_path / "tokens", len(rows), 1, CONTENTS, 1, 16))
    ordered = AlikePictures(reader, TOGETHER)(rows, np.random.default_rng(0))
    assert sorted(ordered) == list(range(AMONG + 7))
    # 7 make one group, and the three that make none are last.
    assert set(ordered[-3:]) <= set(rows[AMONG:])
