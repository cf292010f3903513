"""Statistics of a study against other computations of the same figures."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.human_study.statistics import fleiss_kappa, sign_test, wilson

FLEISS_EXAMPLE = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip
"""The worked example of textbooks: 14 annotators, 10 items, 5 categories, kappa 0.210."""


def test_kappa_of_the_textbooks_example() -> None:
    found = fleiss_kappa(np.array(FLEISS_EXAMPLE))
    assert found is not None
    assert found.kappa is not None
    assert round(found.kappa, 3) == 0.210
    assert round(found.observed, 3) == 0.378


@given(st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=6), min_size=1, max_size=8))
@settings(max_examples=200)
def test_kappa_is_what_counting_pairs_of_votes_gives(items: list[list[int]]) -> None:
    found = fleiss_kappa(np.array([[votes.count(category) for category in range(3)] for votes in items]))
    judged = [votes for votes in items if len(votes) >= 2]
    if not judged:
        assert found is None
        return
    shares = [np.mean([one == other for one, other in permutations(votes, 2)]) for votes in judged]
    pooled = [vote for votes in judged for vote in votes]
    by_chance = np.mean([one == other for one in pooled for other in pooled])
    assert found is not None
    assert found.observed == pytest.approx(np.mean(shares))
    if len(set(pooled)) == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx((np.mean(shares) - by_chance) / (1 - by_chance), abs=1e-9)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=100)
def test_wilson_is_its_closed_form(case: tuple[int, int]) -> None:
    wins, total = case
    share, z = wins / total, 1.959963984540054
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    found = wilson(wins, total)
    assert found is not None
    assert found.value == share
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_shares_of_nothing_and_the_sign_test() -> None:
    assert wilson(0, 0) is None
    assert sign_test(0, 0) is None
    # Two-sided, of a fair coin: 9 or 10 heads or tails of 10.
    assert sign_test(9, 10) == pytest.approx(2 * (10 + 1) / 2**10)
