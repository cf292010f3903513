"""Captions that are replaced by the empty one in training, for classifier-free guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.token_stores import write_tokens

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.group import Group
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, empty_captions
from dalle_cli.stores.tokens import TokenReader

BATCH = 8


def recipe_of(share: float) -> Recipe:
    training = {"updates": 4, "batch_size": BATCH}
    model = {"layers": 2, "heads": 1, "d_head": 4, "d_model": 4, "grid": 2}
    return Recipe.model_validate(
        {
            "image_size": 16,
            "clip": {"model": {"patch_size": 8}},
            "tokenizer": {"vocab_size": 300, "text_length": 5},
            "dvae": {"model": {"codebook_size": 16}},
            "prior": {"model": model, "training": training, "caption_dropout": share},
        }
    )


def task(store: Path, share: float, group: Group | None = None) -> PriorTask:
    recipe = recipe_of(share)
    return PriorTask(recipe, TokenReader(store), build_prior(recipe), group or Group())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.zarr", 20, 5, 300, 2, 16)


def test_the_share_is_what_the_recipe_says() -> None:
    places = np.arange(1000)
    for share in (0.0, 0.1, 0.5, 1.0):
        drawn = np.stack([empty_captions(0, step, places, share) for step in range(50)])
        assert abs(drawn.mean() - share) < 5 * np.sqrt(share * (1 - share) / drawn.size) + 1e-12
        if 0 < share < 1:
            # Neither a place nor a step has its fate: means over the other vary as those of independent draws.
            for axis, count in ((0, 50), (1, 1000)):
                assert drawn.mean(axis).std() == pytest.approx(np.sqrt(share * (1 - share) / count), rel=0.3)
    assert not np.array_equal(empty_captions(0, 0, places, 0.5), empty_captions(1, 0, places, 0.5))


def test_emptied_rows_differ_from_the_others_in_their_length_alone(store: Path) -> None:
    plain, dropped = task(store, 0.0), task(store, 0.5)
    emptied = 0
    for step, (a, b) in enumerate(zip(plain.batches(0, 6), dropped.batches(0, 6), strict=True)):
        empty = torch.from_numpy(empty_captions(0, step, np.arange(BATCH), 0.5))
        assert b.length.equal(torch.where(empty, 0, a.length))
        assert b.image.equal(a.image)
        assert b.text.equal(a.text)
        emptied += int(empty.sum())
    assert 10 < emptied < 38


def test_processes_and_resumed_runs_empty_the_same_rows(store: Path) -> None:
    whole = [batch.length for batch in task(store, 0.5).batches(0, 4)]
    parts = [[batch.length for batch in task(store, 0.5, Group(rank, 3)).batches(0, 4)] for rank in range(3)]
    assert all(torch.cat(some).equal(alone) for *some, alone in zip(*parts, whole, strict=True))
    resumed = [batch.length for batch in task(store, 0.5).batches(2, 4)]
    assert all(a.equal(b) for a, b in zip(resumed, whole[2:], strict=True))


def test_the_model_sees_paddings_alone_and_learns_no_text_from_them(store: Path) -> None:
    every = task(store, 1.0)
    batch = next(iter(every.batches(0, 1)))
    assert not batch.length.any()
    prior = every.model
    ids = prior.with_padding(batch.text, batch.length)
    assert ids.equal((prior.text_vocab + torch.arange(5)).expand(BATCH, -1))
    ((part, share),) = every.micro_batches(batch, None)
    with torch.no_grad():
        found = every.loss(part, 0)
    assert share == 1
    assert float(found["text"]) == 0
    assert float(found["image"]) > 0
