"""Samples in columns, against lists of their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.data.sample_table import SampleTable

Line = dict[str, Any]
NAMES = ["a cat", " a cat", "a dog", "é", ""]


def lines(**more: Any) -> st.SearchStrategy[list[Line]]:
    """Lines in which samples often repeat, tie, or lack a key."""
    line = st.fixed_dictionaries(
        {"prompt": st.sampled_from(NAMES), "png": st.sampled_from(["x.png", "/a/b.png", "a//b/.png", "é/\udcff", ""])},
        optional={
            "store": st.sampled_from(["s", "t"]),
            "seed": st.integers(0, 1),
            "index": st.integers(0, 2),
            "id": st.one_of(st.integers(0, 3), st.sampled_from(["01", "1", "x"])),
            "scorer": st.just("clip"),
            "rank": st.integers(1, 3),
        },
    )
    return st.lists(line.flatmap(lambda made: st.fixed_dictionaries({k: st.just(v) for k, v in made.items()} | more)))


@given(lines(), st.integers(0, 3))
def test_lines_come_back_as_they_were(given_lines: list[Line], step: int) -> None:
    table = SampleTable(given_lines)
    rows = np.arange(len(given_lines))[:: step + 1]
    found = table.lines(rows)
    assert list(found) == given_lines[:: step + 1]
    assert list(found[1:]) == given_lines[:: step + 1][1:]
    assert list(table.paths(rows)) == [Path(line["png"]) for line in given_lines[:: step + 1]]
    assert [line["prompt"] for line in table.lines(rows, "other")] == ["other"] * len(rows)


@given(lines())
def test_groups_are_those_of_a_dictionary_of_lists(given_lines: list[Line]) -> None:
    table = SampleTable(given_lines)
    for key, name in (("prompt", str.strip), ("id", lambda value: str(value).lstrip("0")), ("store", str)):
        expected: dict[str, list[int]] = {}
        for row, line in enumerate(given_lines):
            if key in line:
                expected.setdefault(name(line[key]), []).append(row)
        found = table.grouped(key, name)
        assert list(found) == list(expected), "in the order of their first rows"
        assert {group: rows.tolist() for group, rows in found.items()} == expected


@given(lines(score=st.one_of(st.sampled_from([0.5, 0.25, 1, -0.0]), st.floats(-1, 1))))
def test_best_first_is_a_stable_sort_of_different_samples(given_lines: list[Line]) -> None:
    table = SampleTable(given_lines)
    different: dict[Any, int] = {}
    for row, line in enumerate(given_lines):
        known = {"store", "seed", "index"} <= line.keys()
        different.setdefault((line["store"], line["seed"], line["index"]) if known else row, row)
    expected = sorted(
        different.values(), key=lambda row: (-given_lines[row]["score"], given_lines[row].get("rank", row))
    )
    assert table.best_first(np.arange(len(given_lines))).tolist() == expected


def test_what_has_no_score_or_values_of_other_types() -> None:
    whole: Line = {"prompt": "p", "png": "x.png", "score": 1, "rank": 2}
    odd = {**whole, "score": "1", "rank": 2.5, "store": [], "seed": {}}
    table = SampleTable([whole, odd, {**whole, "rank": 2**70}])
    assert table.scored(np.array([0, 2]))
    assert not table.scored(np.array([0, 1]))
    assert list(table.lines(np.arange(3))) == [
        whole,
        {"prompt": "p", "png": "x.png"},
        {"prompt": "p", "png": "x.png", "score": 1.0},
    ]
    assert len(SampleTable()) == 0
    assert SampleTable().grouped("prompt", str) == {}
