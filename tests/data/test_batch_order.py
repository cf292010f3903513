"""The order of batches: permutations of the rows, and the same pictures whatever the workers and the first update."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.running import Chain, smallest_recipe
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures


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


def test_rows_beyond_a_window_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.data.batch_order.WINDOW", 7)
    drawn, _ = BatchOrder(np.arange(40), 40, 0).batch(0)
    assert sorted(drawn.tolist()) == list(range(40))
    windows = {tuple(sorted(drawn[i : i + 7] // 7)) for i in range(0, 35, 7)}
    assert len(windows) >= 4  # neighbours stay together, so that a large store is read in few reads


def test_batches_of_pictures_do_not_depend_on_the_workers_or_on_where_a_run_begins(by_hand: Chain) -> None:
    recipe = Recipe.model_validate(smallest_recipe(Path("unused"), None))
    source = open_source(str(by_hand.train))

    def batches(workers: int, start: int) -> list[torch.Tensor]:
        pictures = TrainingPictures(source, np.arange(5, 30), 32, recipe.data, 0, 8, flip=True, workers=workers)
        return [batch.pictures for batch in pictures.batches(start, 6)]

    whole = batches(0, 0)
    assert whole[0].shape == (8, 32, 32, 3)
    assert whole[0].dtype == torch.uint8
    for workers, start in ((2, 0), (0, 4), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(batches(workers, start), whole[start:], strict=True))
