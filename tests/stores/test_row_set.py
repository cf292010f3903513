"""Tests of sets of rows, against arrays of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.shares import small_windows
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.stores.row_set import RowSet

SETS = st.lists(st.integers(0, 200), max_size=80).map(lambda rows: np.array(sorted(set(rows)), dtype=np.int64))


@given(SETS, st.integers(0, 210), st.lists(st.integers(0, 3), min_size=3, max_size=3))
@settings(max_examples=200)
def test_a_set_is_an_array_of_its_rows(rows: np.ndarray, border: int, times: list[int]) -> None:
    with small_windows(16, 4):
        found = RowSet.of(rows)
        assert (len(found), list(found), found.repeats) == (len(rows), rows.tolist(), False)
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_array_equal(found.below(border), rows[rows < border])
        np.testing.assert_array_equal(found.without(rows[::3]), np.setdiff1d(rows, rows[::3]))
        assert found.counts.tolist() == [int(((rows // 16) == i).sum()) for i in range(len(found.counts))]
        places = np.random.default_rng(0).permutation(len(rows))
        np.testing.assert_array_equal(found.take(places), rows[places])
        weighted = found.weighted([(50, times[0]), (120, times[1]), (201, times[2])])
        several = np.repeat(rows, np.array(times)[np.searchsorted([50, 120, 201], rows, side="right")])
        np.testing.assert_array_equal(weighted, several)
        np.testing.assert_array_equal(weighted.without(rows[:5]), several[~np.isin(several, rows[:5])])
        assert len(weighted) == len(several)
        places = np.random.default_rng(1).permutation(len(several))
        np.testing.assert_array_equal(weighted.take(places), several[places])
        np.testing.assert_array_equal(RowSet.of(several), several)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4096, 5000])
def test_a_full_set(count: int) -> None:
    assert list(RowSet.full(count)) == list(range(count))
    assert len(RowSet.full(count)) == count


def test_a_large_set_is_small() -> None:
    rows = RowSet.full(10**7)
    assert rows.bits.nbytes + rows.counts.nbytes + rows.starts.nbytes < 10**7 / 8 * 1.05
    assert rows.take(np.array([0, 9_999_999, 5_000_000])).tolist() == [0, 9_999_999, 5_000_000]
