"""Hard negatives: groups of neighbours against a search by hand, and the order of batches in training."""

from __future__ import annotations

import hashlib
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.manifests import change_manifest
from helpers.tiny_chain import TinyChain, build_chain
from helpers.token_stores import write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import dalle_cli.data.picture_loader as pictures_module
from dalle_cli.clip.hard_negatives import HardNegativeOrder, group_neighbours
from dalle_cli.clip.model import contrastive_loss, pixels
from dalle_cli.clip.train import ClipTask, build_recipe_clip, load_clip, train_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.data.batch_order import REORDER_BLOCK, BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import load_eval_picture
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.tokens import TokenReader

CODES, GROUP = 7, 4


@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_a_group_is_the_first_point_left_and_its_nearest(n: int, width: int, group_size: int, seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 9, (n, width))
    order = group_neighbours(points.astype(np.float32), group_size).tolist()
    assert sorted(order) == list(range(n))

    def distance(first: int, other: int) -> int:
        return int(((points[first] - points[other]) ** 2).sum())

    left = list(range(n))
    for at in range(0, n, group_size):
        first, *others = order[at : at + group_size]
        assert first == left[0]
        assert others == sorted(left[1:], key=lambda other: (distance(left[0], other), other))[: group_size - 1]
        left = [place for place in left if place not in order[at : at + group_size]]


def test_batches_hold_pictures_of_the_same_codes(tmp_path: Path) -> None:
    # Each picture consists of one code, its caption's first token.
    reader = TokenReader(write_tokens(tmp_path / "tokens", 1000, 3, CODES, 4, 16))
    code = reader.read("image", np.arange(1000))[:, 0, 0]
    rows = np.arange(100, 1000)

    def epoch(seed: int) -> np.ndarray:
        order = BatchOrder(rows, len(rows), seed, reorder=HardNegativeOrder(reader, GROUP))
        return order.batch(0)[0]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert sorted(first) == sorted(other) == rows.tolist()
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()
    kinds = [len(set(code[group])) for group in first.reshape(-1, GROUP)]
    # Only the last three pictures of a code, at most, are grouped with others.
    assert sum(kind > 1 for kind in kinds) <= CODES
    plain = BatchOrder(rows, len(rows), 0).batch(0)[0]
    assert np.mean([len(set(code[group])) for group in plain.reshape(-1, GROUP)]) > 2.5
    # Groups are in random order: consecutive ones are of different codes.
    assert np.mean(code[first[::GROUP]][1:] == code[first[::GROUP]][:-1]) < 0.3


def test_rows_are_reordered_block_by_block_when_their_turn_comes() -> None:
    blocks: list[list[int]] = []

    def backwards(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        blocks.append(rows.tolist())
        return rows[::-1]

    rows = np.arange(2 * REORDER_BLOCK + 7)
    order, plain = BatchOrder(rows, 1000, 0, reorder=backwards), BatchOrder(rows, len(rows), 0).batch(0)[0]
    first = order.batch(0)[0]
    assert blocks == [plain[:REORDER_BLOCK].tolist()]
    np.testing.assert_array_equal(first, plain[:REORDER_BLOCK][::-1][:1000])
    all_rows = np.concatenate([order.batch(step)[0] for step in range(len(rows) // 1000 + 1)])[: len(rows)]
    plain_blocks = [plain[:REORDER_BLOCK], plain[REORDER_BLOCK : 2 * REORDER_BLOCK], plain[2 * REORDER_BLOCK :]]
    np.testing.assert_array_equal(all_rows, np.concatenate([block[::-1] for block in plain_blocks]))
    # A resumed run, which begins in the middle, has the same order.
    np.testing.assert_array_equal(BatchOrder(rows, 1000, 0, reorder=backwards).batch(9)[0], all_rows[9000:10000])


# Training


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def clip_task(chain: TinyChain, workers: int) -> ClipTask:
    changes = [
        "clip.objective.hard_negatives=2",
        "clip.objective.caption_negatives=true",
        f"clip.training.workers={workers}",
    ]
    recipe = load_recipe(chain.places.root.parent / "tiny.yaml", changes)
    return ClipTask(
        recipe, open_source(str(recipe.data.train)), TokenReader(chain.places.tokens), build_recipe_clip(recipe)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_training_takes_these_batches_and_this_loss(chain: TinyChain, workers: int) -> None:
    task = clip_task(chain, workers)
    size = task.recipe.clip.training.batch_size
    order = BatchOrder(task.training_rows, size, task.recipe.seed, reorder=HardNegativeOrder(task.reader, 2))
    plain = BatchOrder(task.training_rows, size, task.recipe.seed)
    for step, (pictures, text_ids) in zip(range(2, 4), task.batches(2, 4), strict=True):
        rows = order.batch(step)[0]
        assert rows.tolist() != plain.batch(step)[0].tolist()
        wanted = np.stack([load_eval_picture(task.source, row, 32, task.recipe.data) for row in rows.tolist()])
        np.testing.assert_array_equal(pictures.numpy(), wanted)
        with torch.no_grad():
            loss = task.loss((pictures, text_ids), step)["loss"]
            images = pixels(pictures)
            assert loss == contrastive_loss(task.model, images, text_ids, caption_negatives=True)
            assert loss != contrastive_loss(task.model, images, text_ids)


def test_what_workers_get_can_go_to_a_process_that_is_no_fork(
    chain: TinyChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures_module, "DataLoader", partial(DataLoader, multiprocessing_context="spawn"))
    (found,) = clip_task(chain, workers=1).batches(0, 1)
    assert found[0].dtype == torch.uint8


def test_the_clip_of_an_earlier_version_is_refused(chain: TinyChain, tmp_path: Path) -> None:
    out = tmp_path / "clip"
    shutil.copytree(chain.places.clip, out)
    step = steps_in(out)[-1]
    assert load_clip(open_checkpoint(out)) is not None
    file = step / "ema.safetensors"
    weights = load_file(file)
    weights["visual.positional_embedding"] += 0.1
    save_file(weights, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    change_manifest(step, lambda manifest: manifest["files"].update({file.name: digest}))
    said = re.escape(f"{step}: is a CLIP of an earlier version of dalle; delete {out} and run dalle train-clip again")
    with pytest.raises(UserError, match=said):
        load_clip(open_checkpoint(out))
    recipe = load_recipe(chain.places.root.parent / "tiny.yaml")
    with pytest.raises(UserError, match=said):
        train_clip(recipe, open_source(str(recipe.data.train)), chain.places.tokens, out)
