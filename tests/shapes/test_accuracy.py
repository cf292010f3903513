"""Accuracy of samples on captions of the shapes world, against other computations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_chain import HELD_OUT, SEEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.shapes.accuracy import (
    JudgedPool,
    Pool,
    accuracy,
    best_of_subset,
    claim_of,
    group_by_caption,
    group_of,
    judge,
    pool_sizes,
)
from dalle_cli.shapes.drawing import render
from dalle_cli.shapes.scene import random_scene
from dalle_cli.shapes.world import phrasings

Line = dict[str, Any]


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
@settings(max_examples=150)
def test_best_of_a_subset_is_the_mean_over_all_subsets(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(range(len(right)), k))
    # Samples are in rank order, so the best of a subset is its first.
    assert best_of_subset(right, k) == pytest.approx(sum(right[min(s)] for s in subsets) / len(subsets))


def test_sizes_of_pools_double_up_to_the_whole() -> None:
    assert [pool_sizes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    for k in (0, 3):
        with pytest.raises(ValueError, match="a subset of"):
            best_of_subset([True, False], k)


def ranked_pictures(folder: Path, split: str, count: int, drawn: Callable[[int], int]) -> list[Line]:
    """Return lines for the captions of scenes 0 to count - 1 in which scene i has the picture of scene drawn(i)."""
    lines: dict[str, Line] = {}
    for i in range(count):
        file = folder / f"{split}-{i}.png"
        Image.fromarray(render(random_scene(0, split, drawn(i)))).save(file)
        caption = phrasings(random_scene(0, split, i))[0]
        lines[caption] = {"prompt": caption, "png": str(file), "index": 0, "score": 0.5, "rank": 1}
    return list(lines.values())


@pytest.mark.parametrize(("split", "group"), [("seen", "seen pairs"), ("heldout", "held-out pairs")])
def test_true_pictures_are_right_and_swapped_ones_wrong(tmp_path: Path, split: str, group: str) -> None:
    n = 16
    lines = ranked_pictures(tmp_path, split, n, lambda i: i)
    true = accuracy(judge(group_by_caption(lines, "lines")))
    assert (true.best.value, true.best.error, true.best.prompts) == (1.0, 0.0, len(lines))
    assert len(lines) > n - 3
    swapped = judge(group_by_caption(ranked_pictures(tmp_path, split, n, lambda i: (i + 1) % n), "lines"))
    assert {item.group for item in swapped} == {group}
    wrong = accuracy(swapped)
    assert wrong.best.value == 0
    assert wrong.single is not None
    assert wrong.single.value == 0


def judged(right: list[bool], indices: list[int] | None = None) -> JudgedPool:
    lines = tuple({"index": i} for i in (indices or range(len(right))))
    return JudgedPool(Pool("a large red tee", lines), "seen pairs", tuple(right))


def test_figures_of_a_group_by_hand() -> None:
    found = accuracy([judged([True, False, False, True]), judged([False, True, False, False])])
    assert found.single is not None
    assert found.any_right is not None
    assert (found.prompts, found.samples, found.pool_size) == (2, 8, 4)
    assert found.single.value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found.best.value == 0.5
    assert found.best.error == pytest.approx((0.25 / 2) ** 0.5)
    assert found.any_right.value == 1.0
    # Of the six pairs of four, the best is sample 1 in three, sample 2 in two, sample 3 in one.
    assert found.by_pool_size[2].value == pytest.approx((3 / 6 + 2 / 6) / 2)
    assert found.by_pool_size[1] == found.single
    assert found.by_pool_size[4] == found.best


def test_the_best_alone_tell_nothing_of_single_samples() -> None:
    found = accuracy([judged([True, True], indices=[6, 3]), judged([False, True])])
    assert found.best.value == 0.5
    assert found.single is None
    assert found.any_right is None
    assert found.by_pool_size == {}


def test_lines_are_gathered_by_caption_best_first() -> None:
    lines = [
        {"prompt": p, "png": "x", "index": i, "score": s, "rank": r}
        for p, i, s, r in [("b", 0, 0.1, 3), ("a", 0, 0.5, 1), ("b", 2, 0.3, 2), ("b", 1, 0.3, 1)]
    ]
    found = group_by_caption(lines, "f")
    assert [(pool.prompt, [line["index"] for line in pool.lines]) for pool in found] == [("b", [1, 2, 0]), ("a", [0])]
    twice = [{**line, "seed": 0, "store": "s", "png": f"{n}.png"} for n in range(2) for line in lines]
    assert [[line["png"] for line in pool.lines] for pool in group_by_caption(twice, "f")] == [["0.png"] * 3, ["0.png"]]
    with pytest.raises(UserError, match=r"f, sample 2: has no score and rank.*dalle rerank"):
        group_by_caption([lines[0], {"prompt": "a", "png": "x"}], "f")


def test_a_held_out_pair_anywhere_counts() -> None:
    groups = {caption: (claim := claim_of(caption)) and group_of(claim) for caption in (SEEN, HELD_OUT, "a cat")}
    assert groups == {SEEN: "seen pairs", HELD_OUT: "held-out pairs", "a cat": None}
    both = claim_of("a large red tee left of a small green bar")
    assert both is not None
    assert group_of(both) == "held-out pairs"
