"""encode-images: its tokens are those of a plain loop, whatever the workers, shards, kills and merges."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.killed_runs import SHARD, SMALL_SHARDS, files, finish
from helpers.pictures import noise, write_sample
from helpers.running import ENVIRONMENT, Chain
from PIL import Image

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import DataSettings, DvaeModel
from dalle_cli.data.images import BadImage, Fit, decode_image, eval_crop, train_crop
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import PREFETCH, consecutive_pictures, load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.dvae.encode import BLOCK, MAX_ACTIVATIONS, encode_images, encode_source
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import phi
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import TokenReader

ROWS = 1500
DATA = DataSettings()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make captioned images, three of them broken."""
    folder = tmp_path_factory.mktemp("encode") / "shapes"
    finish(["make-shapes", folder, "--n", ROWS, "--test-n", 1, "--size", 32, "--seed", 7])
    train = folder / "train"
    tars = sorted(train.glob("*.tar"))
    content = bytearray(tars[0].read_bytes())
    for _ in range(3):  # the signature of every 400th PNG
        at = 0
        for _ in range(400):
            at = content.index(b"\x89PNG", at + 1)
        content[at : at + 4] = b"none"
    tars[0].write_bytes(content)
    return train


def in_a_loop(source: Source, model: DVAE, eps: float) -> np.ndarray:
    """Return tokens (N, 4, 4) from the model alone, block by block, with zeros for broken images."""
    tokens = []
    for start in range(0, len(source), BLOCK):
        pictures, broken = [], []
        for row in range(start, min(start + BLOCK, len(source))):
            try:
                pictures.append(load_eval_picture(source, row, 32, DATA))
            except (BadSample, BadImage):
                pictures.append(np.zeros((32, 32, 3), np.uint8))
                broken.append(row - start)
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        found = model.encode_tokens(phi(x, eps)).numpy()
        found[broken] = 0
        tokens.append(found)
    return np.concatenate(tokens)


class SlowSource:
    """A source whose rows take random times, so that workers overtake one another."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.identity = source, source.name, source.identity

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def image_bytes(self, i: int) -> bytes:
        time.sleep(random.Random(i // 16).choice([0, 0, 0, 0.0005]))
        return self.source.image_bytes(i)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_block_stays_valid_until_the_next_but_one(shapes: Path, workers: int) -> None:
    source = SlowSource(open_source(str(shapes)))
    rows = range(5, 700)
    pieces = consecutive_pictures(source, rows, block=16, image_size=32, data=DATA, seed=0, workers=workers)  # type: ignore[arg-type]
    before = None
    seen: list[str] = []
    for number, block in enumerate(pieces):
        if number % (2 * PREFETCH) == 0:
            time.sleep(0.02)  # the workers get as far ahead as they may
        for valid in filter(None, (before, block)):
            for key, picture in zip(valid.keys[::5], valid.pictures[::5], strict=True):
                row = rows.start + 16 * (number - (valid is before)) + valid.keys.index(key)
                assert source.key(row) == key
                if key in valid.reasons:
                    assert not picture.any()
                else:
                    np.testing.assert_array_equal(picture[0], load_eval_picture(source, row, 32, DATA))  # type: ignore[arg-type]
        seen += block.keys
        before = block
    assert seen == [source.key(row) for row in rows]


def test_tokens_are_those_of_a_plain_loop(by_hand: Chain, shapes: Path, tmp_path: Path) -> None:
    """Tokens are the same with any number of workers and shares; broken images are skipped and listed."""
    program = (sys.executable, "-c", SMALL_SHARDS)
    source, checkpoint = open_source(str(shapes)), open_checkpoint(by_hand.dvae, "dvae")
    expected = in_a_loop(source, load_dvae(checkpoint), checkpoint.recipe().dvae.objective.logit_laplace_eps)
    command = ["encode-images", by_hand.recipe, "--data", shapes, "--dvae", by_hand.dvae]
    whole, store = tmp_path / "whole.zarr", tmp_path / "tokens.zarr"
    finish([*command, "--tokens", whole, "--set", "dvae.training.workers=2"], program)
    for number in (3, 1, 2):
        out = finish([*command, "--tokens", store, "--shard", f"{number}/3"], program)
        assert out == f"{store}\n"
    assert files(store) == files(whole)
    import zarr

    found = zarr.open_group(str(store), mode="r")
    np.testing.assert_array_equal(found["image"][:], expected)
    assert sum(TokenReader(store).part("image").skipped.values()) == 3
    assert np.count_nonzero(found["image_ok"][:] == 0) == 3
    assert len((store / "skipped-image.jsonl").read_text().splitlines()) == 3


def source_of_blocks(folder: Path, count: int, blocks: tuple[int, int]) -> Source:
    """Open a source of ``count`` pictures of random blocks, (columns, rows) of them, six pixels wide."""
    for i in range(count):
        picture = noise(*blocks, i).resize((6 * blocks[0], 6 * blocks[1]), Image.Resampling.NEAREST)
        write_sample(folder, f"{i}", picture, f"blocks {i}")
    return open_source(str(folder))


def test_views_are_random_crops_and_each_epoch_sees_the_next(by_hand: Chain, tmp_path: Path) -> None:
    source = source_of_blocks(tmp_path / "pictures", 5, (9, 7))
    checkpoint = open_checkpoint(by_hand.dvae, "dvae")
    model, eps = load_dvae(checkpoint), checkpoint.recipe().dvae.objective.logit_laplace_eps
    stores = {}
    for views in (1, 3):
        recipe = load_recipe(by_hand.recipe, ["seed=4", f"data.views={views}"])
        encode_source(recipe, source, checkpoint, tmp_path / f"{views}.zarr")
        stores[views] = TokenReader(tmp_path / f"{views}.zarr")
    rows, many = np.arange(5), stores[3]
    first = stores[1].read("image", rows)
    np.testing.assert_array_equal(stores[1].epoch_image(rows, np.arange(5)), first)
    np.testing.assert_array_equal(many.read("image", rows), first)
    for epoch in range(6):
        found = many.epoch_image(rows, np.full(5, epoch))
        for row in rows:
            image = decode_image(source.image_bytes(int(row)))
            crop = eval_crop(image, 32)
            if epoch % 3:
                crop = train_crop(image, 32, numpy_generator(4, "view", int(row), epoch % 3))
            expected = encode_images(model, torch.from_numpy(crop)[None], eps)[0].numpy()
            assert (found[row] == expected).mean() > 0.9  # alone, sums are rounded otherwise
        if epoch % 3 == 0:
            np.testing.assert_array_equal(found, first)
    assert any(not np.array_equal(many.epoch_image(rows, np.full(5, view)), first) for view in (1, 2))
    with pytest.raises(UserError, match="was made with views 3, now 1"):
        encode_source(load_recipe(by_hand.recipe, ["seed=4"]), source, checkpoint, tmp_path / "3.zarr")
    with pytest.raises(UserError, match="views 2 are random crops, and crop is false"):
        load_recipe(by_hand.recipe, ["data.views=2", "data.crop=false"])


def test_pictures_are_made_square_as_the_recipe_says(by_hand: Chain, tmp_path: Path) -> None:
    source = source_of_blocks(tmp_path / "pictures", 3, (16, 9))
    checkpoint = open_checkpoint(by_hand.dvae, "dvae")
    model, eps = load_dvae(checkpoint), checkpoint.recipe().dvae.objective.logit_laplace_eps
    fits: list[Fit] = ["crop", "pad", "stretch"]
    for fit in fits:
        recipe = load_recipe(by_hand.recipe, [f"data.fit={fit}"])
        encode_source(recipe, source, checkpoint, tmp_path / f"{fit}.zarr")
        crops = [eval_crop(decode_image(source.image_bytes(row)), 32, fit) for row in range(3)]
        expected = encode_images(model, torch.from_numpy(np.stack(crops)), eps).numpy()
        np.testing.assert_array_equal(TokenReader(tmp_path / f"{fit}.zarr").read("image", np.arange(3)), expected)
        np.testing.assert_array_equal(load_eval_picture(source, 1, 32, recipe.data), crops[1])
    with pytest.raises(UserError, match=r"pad\.zarr: .*fit"):
        encode_source(load_recipe(by_hand.recipe), source, checkpoint, tmp_path / "pad.zarr")


def test_large_pictures_are_encoded_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DVAE(DvaeModel(n_hid=4, n_init=4, blocks_per_group=1, codebook_size=32)).eval()
    pictures = torch.randint(0, 256, (7, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = encode_images(model, pictures, 0.1)
    sizes = []
    real = model.encode_tokens
    monkeypatch.setattr(model, "encode_tokens", lambda x: (sizes.append(len(x)), real(x))[1])
    monkeypatch.setattr("dalle_cli.dvae.encode.MAX_ACTIVATIONS", 3 * 16 * 16 * 4)
    assert torch.equal(encode_images(model, pictures, 0.1), whole)
    assert sizes == [3, 3, 1]
    assert MAX_ACTIVATIONS // (256 * 256 * 256) == 8
    assert MAX_ACTIVATIONS // (64 * 64 * 32) > BLOCK


def strike(command: list[object], store: Path, kills: int, seed: int, longest: float) -> int:
    """Kill ``command`` at random moments from its start on, and return how many kills found it alive."""
    rng = random.Random(seed)
    met = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SMALL_SHARDS, *map(str, command)],
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Half of the kills come during start-up, half while it writes, which begins when the store exists.
        deadline = time.monotonic() + 60
        if rng.random() < 0.5:
            mark = rows_of(store)
            while process.poll() is None and rows_of(store) == mark and time.monotonic() < deadline:
                time.sleep(0.002)
        time.sleep(rng.uniform(0, longest))
        process.kill()
        met += process.wait() == -signal.SIGKILL
    return met


def rows_of(store: Path) -> int:
    try:
        return TokenReader(store).part("image").rows
    except Exception:
        return -1


def struck_and_calm(by_hand: Chain, shapes: Path, folder: Path, kills: int, longest: float) -> int:
    command = ["encode-images", by_hand.recipe, "--data", shapes, "--dvae", by_hand.dvae, "--set"]
    command.append("dvae.training.workers=1")
    calm, struck = folder / "calm.zarr", folder / "struck.zarr"
    program = (sys.executable, "-c", SMALL_SHARDS)
    finish([*command, "--tokens", calm], program)
    met = strike([*command, "--tokens", struck], struck, kills, seed=kills, longest=longest)
    finish([*command, "--tokens", struck], program)
    assert files(struck) == files(calm)
    return met


def test_killed_twice_it_ends_with_the_same_bytes(by_hand: Chain, shapes: Path, tmp_path: Path) -> None:
    assert struck_and_calm(by_hand, shapes, tmp_path, kills=2, longest=0.05) >= 1


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bytes(by_hand: Chain, shapes: Path, tmp_path: Path) -> None:
    assert ROWS // SHARD > 20
    assert struck_and_calm(by_hand, shapes, tmp_path, kills=20, longest=0.02) >= 15
