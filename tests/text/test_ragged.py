"""Ragged arrays against lists of lists."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.text.ragged import Ragged


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6), st.integers(1, 6), st.data())
@settings(max_examples=50)
def test_ragged_is_a_list_of_lists(lists: list[list[int]], width: int, data: st.DataObject) -> None:
    ragged = Ragged(np.array([*chain.from_iterable(lists)], np.int64), np.array([len(one) for one in lists], np.int64))
    which = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8)) if lists else []
    taken = ragged.take(np.array(which, np.int64))
    assert taken.values.tolist() == [*chain.from_iterable(lists[i] for i in which)]
    assert ragged.padded(width, -1).tolist() == [(one + [-1] * width)[:width] for one in lists]
