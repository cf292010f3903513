"""The order of batches: permutations of the rows, and the same pictures whatever the workers and the first update."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.running import Chain, smallest_recipe
from helpers.shares import small_windows
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.row_set import RowSet


@given(size=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 3), steps=st.integers(1, 12))
def test_every_epoch_is_a_permutation_and_batches_run_on_across_epochs(
    size: int, batch: int, seed: int, steps: int
) -> None:
    rows = np.arange(size) * 3 + 1
    order = BatchOrder(rows, batch, seed)
    batches = [order.batch(step) for step in range(steps)]
    stream = np.concatenate([drawn for drawn, _ in batches])
    epochs = np.concatenate([epoch for _, epoch in batches])
    np.testing.assert_array_equal(epochs, np.arange(len(stream)) // size)
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == rows.tolist()
    left = stream[len(stream) // size * size :]
    assert len(set(left.tolist())) == len(left)
    assert set(left.tolist()) <= set(rows.tolist())
    # Whatever was asked before, in any order, by any reader.
    for step in random.Random(seed).sample(range(steps), steps):
        np.testing.assert_array_equal(BatchOrder(rows, batch, seed).batch(step)[0], batches[step][0])
        np.testing.assert_array_equal(order.batch(step)[0], batches[step][0])


def test_epochs_and_seeds_differ() -> None:
    rows = np.arange(500)
    first, second = (BatchOrder(rows, 500, 0).batch(step)[0].tolist() for step in (0, 1))
    other = BatchOrder(rows, 500, 1).batch(0)[0].tolist()
    assert first != second
    assert first != other
    assert first != rows.tolist()


def test_a_window_has_blocks_from_all_over_and_every_row_is_drawn_once() -> None:
    rows = np.delete(np.arange(400), np.arange(64, 99))  # four blocks are gone, and a part of a fifth
    with small_windows(8, 5):
        order = BatchOrder(rows, 73, 0)
        drawn = np.concatenate([order.batch(step)[0] for step in range(5)])
        assert sorted(drawn.tolist()) == rows.tolist()
        blocks = [set((drawn[i : i + 30] // 8).tolist()) for i in range(0, 360, 30)]
        assert all(len(window) <= 11 for window in blocks)  # so that a large store is read in few reads
        spans = [max(window) - min(window) for window in blocks]
        assert min(spans) > 5  # and not from one place
        for step in (4, 0, 3):  # whatever was asked before
            np.testing.assert_array_equal(BatchOrder(rows, 73, 0).batch(step)[0], drawn[step * 73 : step * 73 + 73])


def consecutive_windows(rows: np.ndarray, seed: int, epoch: int, window: int) -> list[int]:
    """Shuffle an epoch as versions before random blocks did."""
    rng = numpy_generator(seed, "epoch", epoch)
    borders = np.searchsorted(rows, np.arange(window, rows[-1] + 1, window))
    parts = [part for part in np.split(rows, borders) if len(part)]
    return [row for i in rng.permutation(len(parts)) for row in rng.permutation(parts[i]).tolist()]


@pytest.mark.parametrize("count", [40, 333])
def test_runs_of_earlier_versions_go_on_in_their_order(count: int) -> None:
    """Small sets, of one window, have the same order by both names."""
    rows = np.flatnonzero(np.random.default_rng(0).random(count) < 0.8)
    with small_windows(8, 5):
        old = [BatchOrder(rows, len(rows), 3, order="consecutive windows").batch(step)[0].tolist() for step in range(3)]
        new = [BatchOrder(rows, len(rows), 3).batch(step)[0].tolist() for step in range(3)]
    assert old == [consecutive_windows(rows, 3, epoch, 40) for epoch in range(3)]
    assert (new == old) == (count == 40)


def test_a_batch_draws_on_blocks_from_all_over_the_set() -> None:
    rows = RowSet.full(64 * 500)
    with small_windows(64, 16):
        for name in ("random blocks", "consecutive windows"):
            order = BatchOrder(rows, 64, 0, order=name)
            spread = np.std([order.batch(step)[0] // 64 for step in range(500)], axis=1).mean()
            assert (spread > 0.8 * 500 / np.sqrt(12)) == (name == "random blocks")  # that of 500 even blocks


def test_empty_blocks_do_not_count() -> None:
    """A set of few rows is shuffled as one, whatever comes after them."""
    rows = RowSet(np.concatenate([np.full(100, 255, np.uint8), np.zeros(10_000, np.uint8)]))
    with small_windows(80, 10):
        drawn = BatchOrder(rows, 800, 1).batch(0)[0].tolist()
    assert drawn == consecutive_windows(np.arange(800), 1, 0, 800)


def test_batches_of_pictures_do_not_depend_on_the_workers_or_on_where_a_run_begins(by_hand: Chain) -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))
    source = open_source(str(by_hand.train))

    def batches(workers: int, start: int) -> list[torch.Tensor]:
        rows = RowSet.of(np.arange(5, 30))
        pictures = TrainingPictures(source, rows, 32, recipe.data, 0, 8, flip=True, workers=workers)
        return [batch.pictures for batch in pictures.batches(start, 6)]

    whole = batches(0, 0)
    assert whole[0].shape == (8, 32, 32, 3)
    assert whole[0].dtype == torch.uint8
    for workers, start in ((2, 0), (0, 4), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(batches(workers, start), whole[start:], strict=True))
