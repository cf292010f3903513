"""The held-out split: it depends on each row alone, and never leaves training without samples."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.errors import UserError
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.stores.row_set import RowSet


@given(
    size=st.integers(2, 400),
    seed=st.integers(0, 2**63 - 1),
    share=st.sampled_from([0.05, 0.2, 0.5]),
    some=st.randoms(use_true_random=False),
)
def test_the_holdout_depends_on_each_row_alone(size: int, seed: int, share: float, some: random.Random) -> None:
    rows = np.arange(size)
    try:
        training, held = split_holdout(RowSet.of(rows), share, seed)
    except UserError:
        assert size < 20
        return
    assert sorted([*training, *held]) == rows.tolist()
    assert len(held) >= 1
    larger_training, larger_held = split_holdout(RowSet.full(5000), share, seed)
    assert abs(len(larger_held) / 5000 - share) < 0.05
    if set(held.tolist()) != {held[0]} or held[0] in larger_held:  # else the one row that had to be chosen
        assert set(held.tolist()) == {row for row in larger_held.tolist() if row < size}
    subset = np.array(sorted(some.sample(range(5000), 1000)))
    _, held_of_subset = split_holdout(RowSet.of(subset), share, seed)
    assert set(held_of_subset.tolist()) == set(subset.tolist()) & set(larger_held.tolist())
    assert np.all(np.diff(larger_training) > 0)
    assert np.all(np.diff(larger_held) > 0)


def test_a_holdout_of_nothing_and_of_everything() -> None:
    training, held = split_holdout(RowSet.full(10), 0.0, 0)
    assert list(training) == list(range(10))
    assert held.size == 0
    with pytest.raises(UserError, match=r"data.holdout: 1.0 leaves none of 10 samples"):
        split_holdout(RowSet.full(10), 1.0, 0)
    small = [len(split_holdout(RowSet.full(20), 0.001, seed)[1]) for seed in range(5)]
    assert min(small) >= 1
    assert split_holdout(RowSet.full(1000), 0.3, 0)[1].tolist() != split_holdout(RowSet.full(1000), 0.3, 1)[1].tolist()
