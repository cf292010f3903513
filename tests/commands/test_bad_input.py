"""Mistakes and broken files: one clear line that names the file, key or row; exit code 2; nothing earlier is lost."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.manifests import change_manifest
from helpers.running import DALLE, ENVIRONMENT, Chain, Done, run, smallest_recipe, write_recipe
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.files import owned, sha256_file
from dalle_cli.stores.row_set import RowSet
from dalle_cli.stores.shards import WHOLE, ShareProgress, Shares
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows

SHORT = ("--set", "dvae.training.updates=2")


def picture(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pairs(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture(seed))
        (folder / f"{name}.txt").write_text(f"a picture of {name}")


@pytest.fixture
def spoiled(by_hand: Chain, tmp_path: Path) -> Path:
    """A copy of the chain's outputs, to be damaged."""
    return Path(shutil.copytree(by_hand.root / "made", tmp_path / "made"))


# Pictures and captions


def test_broken_pictures_and_missing_captions_are_skipped_and_listed(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pairs(data, [f"good-{i}" for i in range(9)])
    (data / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (data / "broken.txt").write_text("a picture that is none")
    (data / "cut.png").write_bytes(picture(50)[:-200])
    (data / "cut.txt").write_text("a picture cut short")
    (data / "silent.png").write_bytes(picture(51))
    (data / "empty.png").write_bytes(picture(52))
    (data / "empty.txt").write_text("  \n")
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", data))
    for command in ("train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior", "train-clip"):
        done = call(command, recipe, *SHORT, "--set", "prior.training.updates=2", "--set", "clip.training.updates=2")
        assert done.code == 0, done.err
    store = tmp_path / "run" / "tokens.zarr"
    listed = {
        part: {line["key"]: line["reason"] for line in map(json.loads, (store / f"skipped-{part}.jsonl").open())}
        for part in ("text", "image")
    }
    assert set(listed["image"]) == {"broken", "cut"}
    assert set(listed["text"]) == {"silent", "empty"}
    assert "no caption" in listed["text"]["silent"]
    assert "empty" in listed["text"]["empty"]
    reader = TokenReader(store)
    assert reader.strings("key", usable_rows(reader)) == [f"good-{i}" for i in range(9)]


def test_pictures_that_are_all_broken_are_refused_at_once(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pairs(data, ["a", "b"])
    for name in ("a", "b"):
        (data / f"{name}.png").write_bytes(b"nothing")
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", data))
    assert "no image that was tried can be used (a: " in call("train-dvae", recipe).mistake()


def test_pictures_that_break_off_while_training_are_one_line(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = [f"{i:03d}" for i in range(240)]
    write_pairs(data, names)
    for name in names[1:]:  # only the first can be read, and the next 100 of any other cannot
        (data / f"{name}.png").write_bytes(b"nothing")
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", data))
    for workers in (0, 1):
        refused = call("train-dvae", recipe, "--set", f"dvae.training.workers={workers}").mistake()
        assert f"{data}: 100 samples drawn for " in refused
        assert "Error" not in refused


def test_no_worker_outlives_what_it_raised(tmp_path: Path) -> None:
    """They ignore SIGTERM, which is how Python ends those that are left, before it waits for them."""
    write_pairs(tmp_path, ["a", "b"])
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"nothing")
    source, data = open_source(str(tmp_path)), Recipe().data
    pictures = TrainingPictures(source, RowSet.full(2), 32, data, seed=0, batch_size=2, flip=False, workers=2)
    with pytest.raises(UserError, match="100 samples drawn for") as kept:
        next(pictures.batches(0, 9))
    assert kept.traceback
    assert not multiprocessing.active_children()


def test_a_tar_cut_short_gives_what_precedes(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    (whole,) = by_hand.train.glob("*.tar")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    done = call("train-tokenizer", by_hand.recipe, "--data", cut, "--out", tmp_path / "words")
    assert done.code == 0
    assert "left out: " in done.err
    assert "cut short" in done.err
    assert 10 < len(open_source(str(cut))) < 40
    cut.write_bytes(whole.read_bytes()[:100])
    assert str(cut) in call("train-tokenizer", by_hand.recipe, "--data", cut, "--out", tmp_path / "w").mistake()
    cut.write_bytes(os.urandom(4096))
    assert str(cut) in call("train-tokenizer", by_hand.recipe, "--data", cut, "--out", tmp_path / "w").mistake()


def test_an_empty_folder_and_none_at_all(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, why in ((empty, "no images found"), (tmp_path / "missing", "no such file or folder")):
        refused = call("train-dvae", by_hand.recipe, "--data", place, "--out", tmp_path / "run").mistake()
        assert str(place) in refused
        assert why in refused
    (empty / "a.png").write_bytes(picture())
    refused = call("train-tokenizer", by_hand.recipe, "--data", empty, "--out", tmp_path / "run").mistake()
    assert "no caption" in refused


def test_the_same_name_in_two_folders_is_two_pairs(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    data, store = tmp_path / "data", tmp_path / "tokens.zarr"
    write_pairs(data, ["cats/0001", "dogs/0001"])
    done = call("tokenize-text", by_hand.recipe, "--data", data, "--tokenizer", by_hand.tokenizer, "--tokens", store)
    assert done.code == 0
    reader = TokenReader(store)
    assert reader.strings("key", range(2)) == ["cats/0001", "dogs/0001"]
    assert reader.strings("caption", range(2)) == ["a picture of cats/0001", "a picture of dogs/0001"]


# Recipes


def test_a_mistyped_key_is_named_with_its_line_and_the_right_one(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("name: typo\ndvae:\n  model:\n    n_hidd: 8\n")
    assert call("train-dvae", file).mistake() == (
        f"dalle: {file}:4: dvae.model.n_hidd: unknown key; did you mean 'n_hid'?"
    )


def test_a_recipe_whose_aliases_stand_for_millions_of_settings_is_refused_at_once(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "aliases.yaml"
    lines = ["a: &a {x: 1, y: 2, z: 3, w: 4}"]
    lines += [
        f"{new}: &{new} {{x: *{old}, y: *{old}, z: *{old}, w: *{old}}}" for old, new in pairwise("abcdefghijklmn")
    ]
    file.write_text("\n".join(lines))
    assert "more than 10000 settings, counted with those of aliases" in call("show", file).mistake()


def test_a_long_chain_of_extends_is_refused(call: Call, tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n" if i < 29 else "seed: 1\n")
    assert "0.yaml: 'extends' leads through more than 20 recipes" in call("show", tmp_path / "0.yaml").mistake()
    assert call("show", tmp_path / "15.yaml").code == 0


def test_the_folder_of_a_run_stands_for_its_stages(call: Call, by_hand: Chain, tmp_path: Path) -> None:
    run = by_hand.prior.parent
    assert run == by_hand.dvae.parent
    assert call("sample", run, "a red star", "--n", 1, "--out", tmp_path / "samples").code == 0
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    said = call("sample", tmp_path / "run", "a red star").mistake()
    assert f"{tmp_path}/run: this run has no prior yet; train it with dalle train-prior" in said


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("name: [unclosed\nseed: 1\n", 2, "a comma or a closing bracket is missing; the bracket opens in line 1"),
        ("name: a\n\tseed: 1\n", 2, "a tab cannot indent a line; use spaces"),
        ("seed: 1\nname: 'abc\nrun: x\n", 2, "a quote that opens in this line is never closed; close it"),
        ("name: a\nrun:abc\nseed: 1\n", 2, "a key without a colon and a space; write key: value"),
        ("run: c:/my runs: here\n", 1, "put text with a colon in quotes"),
        ("data:\n  train: x\n holdout: 1\n", 3, "indented otherwise than the block that begins in line 1"),
        ("name: @home\n", 1, "character '@' cannot begin a value; put it in quotes"),
        ("name: *\n", 1, "put it in quotes"),
        ("name: *star\n", 1, "a value that begins with * is taken for an alias"),
        ('run: "a\\q"\n', 1, "in double quotes a backslash must be doubled"),
        ("- a\n- b\n", 1, "not a recipe; write keys and settings, such as name: mine"),
        ("data\n  train: x\n", 1, "a colon is missing at the end of the line"),
        ("seed: 1\ndvae: {training: {updates: 5}}}\n", 2, "there is a closing bracket too many"),
        ("{{ name }}: x\n", 1, "a key must be a word"),
        ("name: a\nseed: !!python/object/apply:os.getcwd []\n", 2, "seed: not a plain value"),
        ("name: a\nseed: !!int three\n", 2, "seed: not a plain value"),
        ("seed: 1\nseed: 2\n", 2, "written twice"),
        ("extends: [a, b]\n", 1, "name one recipe"),
    ],
)
def test_malformed_recipes(call: Call, tmp_path: Path, text: str, line: int, why: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    refused = call("show", file).mistake()
    assert refused.startswith(f"dalle: {file}:{line}: ")
    assert why in refused


def test_recipes_that_extend_in_a_circle_or_nothing(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    refused = call("show", tmp_path / "a.yaml").mistake()
    assert "leads back to the recipe itself" in refused
    assert "a.yaml" in refused
    assert "b.yaml" in refused
    (tmp_path / "b.yaml").write_text("extends: c.yaml\n")
    assert "c.yaml: no such recipe" in call("train-prior", tmp_path / "a.yaml").mistake()
    assert "is a folder" in call("train-prior", tmp_path).mistake()
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\n")
    assert "c.yaml: is not text in UTF-8" in call("train-prior", tmp_path / "c.yaml").mistake()


# Checkpoints


def test_a_checkpoint_of_another_kind(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a", "png": "a.png"}\n')
    for found, needed, arguments in (
        ("dvae", "prior", ("sample", by_hand.dvae, "a red star")),
        ("prior", "dvae", ("sample", by_hand.prior, "a red star", "--dvae", by_hand.prior)),
        ("prior", "clip", ("rerank", lines, "--clip", by_hand.prior)),
        ("dvae", "prior", ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", by_hand.dvae)),
    ):
        assert f"is a {found} checkpoint where a {needed} is needed" in call(*arguments).mistake()
    assert "holds no checkpoint" in call("sample", tmp_path, "a red star").mistake()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, lambda file: file.write_bytes(b"")])
def test_damaged_weights(spoiled: Path, call: Call, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for stage in ("prior", "dvae"):
        weights = open_checkpoint(spoiled / stage).path / "ema.safetensors"
        kept = weights.read_bytes()
        damage(weights)
        refused = call("sample", spoiled / "prior", "a red star", "--out", tmp_path / stage).mistake()
        assert str(weights) in refused
        assert "restore it" in refused
        weights.write_bytes(kept)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer/optimizer.safetensors"])
def test_a_run_whose_newest_checkpoint_is_damaged(by_hand: Chain, spoiled: Path, call: Call, name: str) -> None:
    run_folder = spoiled / "prior"
    arguments = ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", run_folder)
    newest = open_checkpoint(run_folder).path
    truncate(newest / name)
    done = call(*arguments)
    assert done.code == 0
    assert f"{newest / name}: damaged: its sha256 is not the manifest's" in done.err
    assert "looking for an older one" in done.err
    assert "resumes from step-00000008" in done.err
    assert sha256_file(newest / name) == sha256_file(by_hand.prior / newest.name / name)
    for step in run_folder.glob("step-*"):
        truncate(step / name)
    assert "older checkpoint" in call(*arguments, "--set", "prior.training.updates=14").mistake()


OF_ANOTHER_SHAPE: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "longer": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "flat": lambda tensor: tensor.flatten(),
    "one number": lambda tensor: tensor.flatten()[:1],
    "whole numbers": lambda tensor: tensor.to(torch.int64),
    "missing": lambda _: None,
}


@pytest.mark.parametrize("change", OF_ANOTHER_SHAPE)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "image_embedding"),
        ("ema.safetensors", "image_embedding"),
        ("trainer/optimizer.safetensors", "exp_avg_sq.image_embedding"),
        ("trainer/optimizer.safetensors", "step.image_embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_used(
    by_hand: Chain, spoiled: Path, call: Call, file: str, name: str, change: str
) -> None:
    """Give them the right checksums, as another program would; Adam's fused form crashed on such moments."""
    newest = open_checkpoint(spoiled / "prior", which="last").path
    tensors = load_file(newest / file)
    if not tensors[name].dim():
        tensors[name] = tensors[name][None].clone()
    if (changed := OF_ANOTHER_SHAPE[change](tensors.pop(name))) is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, newest / file)
    files = "others" if "/" in file else "files"
    change_manifest(newest, lambda manifest: manifest[files].update({file: sha256_file(newest / file)}))
    arguments = ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", spoiled / "prior", "--extend", 2)
    assert f"{newest / file}: is damaged: " in call(*arguments).mistake()
    if file == "ema.safetensors":
        drawn = ("sample", newest, "a red star", "--dvae", by_hand.dvae, "--tokenizer", by_hand.tokenizer)
        assert f"{newest / file}: is damaged: " in call(*drawn, "--out", spoiled / "s").mistake()


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "prior"}', '{"version": 1, "kind', "\x00\x01", '{"version": 99}'])
def test_a_damaged_manifest(spoiled: Path, call: Call, text: str) -> None:
    manifest = open_checkpoint(spoiled / "prior").path / "manifest.json"
    manifest.write_text(text)
    assert str(manifest) in call("sample", spoiled / "prior", "a red star").mistake()
    manifest.write_bytes(b"\xff\xfe")
    assert str(manifest) in call("sample", manifest.parent, "a red star").mistake()


def test_a_manifest_of_a_newer_format(spoiled: Path, call: Call) -> None:
    manifest = open_checkpoint(spoiled / "prior").path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    assert "upgrade dalle" in call("sample", spoiled / "prior", "a red star").mistake()


class Trap:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_a_pickle_in_place_of_weights_is_never_executed(
    by_hand: Chain, spoiled: Path, call: Call, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    trap = pickle.dumps(Trap(trace))
    pickle.loads(trap)
    assert trace.exists()  # the trap works
    trace.unlink()

    def spring(checkpoint: Path, name: str) -> None:
        (checkpoint / name).write_bytes(trap)

        def accept(manifest: dict[str, Any]) -> None:
            for which in ("files", "others"):
                if name in manifest[which]:
                    manifest[which][name] = sha256_file(checkpoint / name)

        change_manifest(checkpoint, accept)

    prior = open_checkpoint(spoiled / "prior").path
    spring(prior, "ema.safetensors")
    assert "ema.safetensors: damaged" in call("sample", prior, "a red star", "--out", tmp_path / "a").mistake()
    dvae = open_checkpoint(spoiled / "dvae").path
    more = ("--data", by_hand.train, "--out", spoiled / "dvae", "--set", "dvae.training.updates=14")
    for name in ("trainer/optimizer.safetensors", "model.safetensors"):
        spring(dvae, name)
        assert name in call("train-dvae", by_hand.recipe, *more).mistake()
    words = tmp_path / "tokenizer.json"
    words.write_bytes(trap)
    refused = call("sample", by_hand.prior, "a red star", "--tokenizer", words, "--out", tmp_path / "b").mistake()
    assert str(words) in refused
    assert not trace.exists()


# Token stores


def test_a_store_that_is_half_written(by_hand: Chain, spoiled: Path, call: Call, tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    train = ("train-prior", by_hand.recipe, "--tokens", store, "--out", tmp_path / "prior")
    assert f"{store}: is no token store" in call(*train).mistake()
    words = ("--data", by_hand.train, "--tokenizer", by_hand.tokenizer, "--tokens", store)
    assert call("tokenize-text", by_hand.recipe, *words).code == 0
    refused = call(*train).mistake()
    assert "has no image part yet" in refused
    assert "encode-images" in refused

    attributes = spoiled / "tokens.zarr" / "zarr.json"
    state = json.loads(attributes.read_text())
    image = state["attributes"].pop("image")
    attributes.write_text(json.dumps(state))
    Shares(attributes.parent, "image").write(WHOLE, ShareProgress(image["rows"], image["identity"], rows=30))
    for command in (
        ("train-prior", by_hand.recipe, "--tokens", attributes.parent, "--out", tmp_path / "p"),
        ("train-clip", by_hand.recipe, "--data", by_hand.train, "--tokens", attributes.parent, "--out", tmp_path / "c"),
    ):
        refused = call(*command).mistake()
        assert "its image part stops at row 30" in refused
        assert "encode-images again" in refused
    attributes.write_text('{"zarr_format": 3, "node_')
    refused = call("train-prior", by_hand.recipe, "--tokens", attributes.parent, "--out", tmp_path / "p").mistake()
    assert str(attributes.parent) in refused


def test_a_store_of_another_source(by_hand: Chain, spoiled: Path, call: Call, tmp_path: Path) -> None:
    store, other = spoiled / "tokens.zarr", by_hand.root / "shapes" / "seen"
    data = ("--data", other, "--tokens", store)
    for command in (
        ("tokenize-text", by_hand.recipe, *data, "--tokenizer", by_hand.tokenizer),
        ("encode-images", by_hand.recipe, *data, "--dvae", by_hand.dvae),
        ("train-clip", by_hand.recipe, *data, "--out", tmp_path / "clip"),
    ):
        refused = call(*command).mistake()
        assert str(store) in refused
        assert str(other) in refused
        assert str(by_hand.train) in refused
    # A new image part on a text part of other samples.
    fresh = tmp_path / "fresh.zarr"
    words = ("--tokenizer", by_hand.tokenizer, "--tokens", fresh)
    assert call("tokenize-text", by_hand.recipe, "--data", by_hand.train, *words).code == 0
    pairs = tmp_path / "pairs"
    write_pairs(pairs, [f"{number:02d}" for number in range(48)])  # as many as the store has
    refused = call(
        "encode-images", by_hand.recipe, "--data", pairs, "--dvae", by_hand.dvae, "--tokens", fresh
    ).mistake()
    assert f"{fresh}: row 0 is " in refused
    assert "'00' in the source" in refused


def test_a_source_that_has_changed_its_size(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    data, store = tmp_path / "data", tmp_path / "tokens.zarr"
    write_pairs(data, ["a", "b", "c"])
    command = ("tokenize-text", by_hand.recipe, "--data", data, "--tokenizer", by_hand.tokenizer, "--tokens", store)
    assert call(*command).code == 0
    assert call(*command).code == 0
    write_pairs(data, ["d"])
    assert f"was made from {data} (3 samples), and {data} (4 samples) holds other files" in call(*command).mistake()


def test_files_are_known_by_their_content_wherever_they_lie(
    by_hand: Chain, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another spelling of the path, or a copy, is the same source; captions replaced in place are another one."""
    data, recipe = tmp_path / "data", by_hand.recipe
    write_pairs(data, [f"{number:02d}" for number in range(12)])
    shutil.copytree(data, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    store, words, dvae = tmp_path / "tokens.zarr", ("--tokenizer", by_hand.tokenizer), tmp_path / "dvae"
    for place in ("data", "data/", "./data", data, "copy"):
        assert call("tokenize-text", recipe, "--data", place, *words, "--tokens", store).code == 0
        assert call("train-dvae", recipe, "--data", place, "--out", dvae, *SHORT).code == 0
        assert call("encode-images", recipe, "--data", place, "--dvae", dvae, "--tokens", store).code == 0
        prior = ("--tokens", store, "--out", tmp_path / "prior", "--set", "prior.training.updates=2")
        assert call("train-prior", recipe, "--data", place, *prior).code == 0
    for file in data.glob("*.txt"):
        file.write_text("a corrected caption, and a longer one")
    for command in (("tokenize-text", *words), ("encode-images", "--dvae", dvae)):
        refused = call(command[0], recipe, "--data", data, *command[1:], "--tokens", store).mistake()
        assert "holds other files, by their names and sizes; choose another --tokens, or delete the store" in refused
    assert "was begun with the source" in call("train-dvae", recipe, "--data", data, "--out", dvae, *SHORT).mistake()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_shards_of_a_store_are_named(
    by_hand: Chain, spoiled: Path, call: Call, tmp_path: Path, damage: str
) -> None:
    for file in sorted((spoiled / "tokens.zarr").glob("*/c/**/*")):
        if not file.is_file():
            continue
        whole = file.read_bytes()
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        else:
            middle = len(whole) // 3
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
        array = file.relative_to(spoiled / "tokens.zarr").parts[0]
        with pytest.raises(UserError, match=rf"{array}/c/.* is (missing|damaged)"):
            read_all(spoiled / "tokens.zarr")
        file.write_bytes(whole)
    read_all(spoiled / "tokens.zarr")


def test_verify_names_every_damaged_file(by_hand: Chain, spoiled: Path, call: Call) -> None:
    assert "are whole" in call("verify", spoiled).out
    flip_a_bit(spoiled / "tokens.zarr" / "image" / "c" / "0" / "0" / "0")
    (spoiled / "tokens.zarr" / "caption" / "c" / "0").unlink()
    truncate(open_checkpoint(spoiled / "dvae").path / "trainer" / "optimizer.safetensors")
    done = call("verify", spoiled)
    assert "3 of" in done.mistake()
    named = ("image/c/0/0/0 is damaged", "caption/c/0 is missing", "optimizer.safetensors: damaged")
    assert all(name in done.out.replace(": is", " is") for name in named)
    assert call("verify", spoiled / "tokens.zarr").code == 2
    assert call("verify", spoiled / "prior").code == 0
    assert call("verify", spoiled / "tokenizer").code == 0
    (spoiled / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: is damaged" in call("verify", spoiled / "tokenizer").out


def read_all(store: Path) -> None:
    reader = TokenReader(store)
    reader.require_complete()
    for _, read in reader.shards():
        read()


def test_a_store_of_another_tokenizer_or_dvae(by_hand: Chain, spoiled: Path, call: Call, tmp_path: Path) -> None:
    store, data = spoiled / "tokens.zarr", ("--data", by_hand.train)
    words = tmp_path / "words"
    assert call("train-tokenizer", by_hand.recipe, *data, "--out", words, "--set", "tokenizer.vocab_size=300").code == 0
    refused = call("tokenize-text", by_hand.recipe, *data, "--tokenizer", words, "--tokens", store).mistake()
    assert "was made with tokenizer" in refused
    older = by_hand.dvae / "step-00000008"
    refused = call("encode-images", by_hand.recipe, *data, "--dvae", older, "--tokens", store).mistake()
    assert "was made with dvae" in refused
    refused = call(
        "train-prior",
        by_hand.recipe,
        "--tokens",
        store,
        "--out",
        tmp_path / "p",
        "--set",
        "dvae.model.codebook_size=32",
    ).mistake()
    assert "dvae.model.codebook_size = 16, the recipe says 32" in refused


def test_places_that_hold_something_else(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    data, dvae = ("--data", by_hand.train), ("--dvae", by_hand.dvae)
    for place in (file, folder):
        refused = call("encode-images", by_hand.recipe, *data, *dvae, "--tokens", place).mistake()
        assert str(place) in refused
        assert "choose another" in refused
        refused = call("sample", by_hand.prior, "a red star", "--out", place).mistake()
        assert str(place) in refused
        assert "choose another" in refused
    refused = call("train-dvae", by_hand.recipe, *data, "--out", file).mistake()
    assert str(file) in refused
    assert "choose another" in refused
    assert file.read_text() == (folder / "letter.txt").read_text() == "mine"


# Going on with other settings


def test_a_run_goes_on_only_with_its_own_settings(by_hand: Chain, spoiled: Path, call: Call) -> None:
    arguments = ("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", spoiled / "dvae")
    for change, named in (
        ("seed=3", "seed = 0"),
        ("dvae.training.batch_size=2", "dvae.training.batch_size = 4"),
        ("dvae.objective.temperature.updates=7", "dvae.objective.temperature.updates = 150000"),
        ("dvae.objective.kl_weight.end=2.0", "dvae.objective.kl_weight.end = 6.6"),
        ("data.holdout=0.4", "data.holdout = 0.2"),
    ):
        changes = ["--set", change]
        if "temperature" in change:
            changes += ["--set", "dvae.objective.temperature.start=1", "--set", "dvae.objective.temperature.end=0.0625"]
        if "kl_weight" in change:
            changes += ["--set", "dvae.objective.kl_weight.start=0", "--set", "dvae.objective.kl_weight.updates=5000"]
        refused = call(*arguments, *changes).mistake()
        assert f"{spoiled / 'dvae'}: was begun with {named}, the recipe now says " in refused
    free = ("dvae.training.updates=13", "dvae.training.log_every=2", "dvae.training.micro_batch=2", "name=b")
    done = call(*arguments, *(part for change in free for part in ("--set", change)))
    assert done.code == 0
    assert done.out == f"{spoiled / 'dvae' / 'step-00000013'}\n"
    refused = call(
        "train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", spoiled / "prior", "--set",
        "prior.model.conv_kernel=3",
    ).mistake()  # fmt: skip
    assert "prior.model.conv_kernel = 11, the recipe now says 3" in refused


def test_nothing_left_to_train_on(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    everything = ("--set", "data.holdout=1.0", "--out", tmp_path / "run")
    for command in (
        ("train-dvae", by_hand.recipe, "--data", by_hand.train, *everything),
        ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, *everything),
    ):
        assert "data.holdout: 1.0 leaves none of 48 samples" in call(*command).mistake()


# Sampling and reranking


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "no captions to draw"),
        (("a red star", "  "), "prompt 2: the caption is empty"),
        (("a red star", "--top-p", 0), "--top-p 0"),
        (("a \udcff star",), "prompt 1: the caption is not valid Unicode"),
        (("--captions", "missing.txt"), "missing.txt"),
        (("a red star", "--dvae", "missing"), "missing"),
        (("a red star", "--tokenizer", "missing"), "missing"),
    ],
)
def test_requests_that_cannot_be_drawn(by_hand: Chain, call: Call, arguments: tuple[object, ...], why: str) -> None:
    before = sorted((by_hand.root / "made").rglob("*"))
    assert why in call("sample", by_hand.prior, *arguments).mistake()
    assert sorted((by_hand.root / "made").rglob("*")) == before


def test_captions_of_a_run_that_held_none_out(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "prior"
    trained = call("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", out, "--set", "data.holdout=0",
                   "--set", "prior.training.updates=1")  # fmt: skip
    assert trained.code == 0, trained.err
    refused = call("sample", out, "--held-out", "--dvae", by_hand.dvae, "--tokenizer", by_hand.tokenizer).mistake()
    assert "--held-out: data.holdout was 0, so no caption was held out; give captions, or --captions" in refused


def test_a_page_of_the_user_s_is_not_overwritten(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    for folder in ("drawn", "real"):
        (tmp_path / folder).mkdir()
        for i in range(12):
            (tmp_path / folder / f"{i:02d}.png").write_bytes(picture(i))
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("my home page")
    command = ("eval-fid", tmp_path / "drawn", tmp_path / "real", "--clip", by_hand.clip, "--size", 32,
               "--bootstrap", 0, "--cache", tmp_path / "cache", "--page", site)  # fmt: skip
    refused = call(*command).mistake()
    assert f"{site / 'index.html'}: is no page of dalle eval-fid and would be lost; choose another --page" in refused
    assert (site / "index.html").read_text() == "my home page"
    assert not (tmp_path / "cache").exists()
    (site / "index.html").unlink()
    for _ in range(2):  # its own page it replaces
        done = call(*command)
        assert done.code == 0, done.err
    assert "my home page" not in (site / "index.html").read_text()


def test_lines_that_cannot_be_ranked(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    def rerank(data: bytes) -> str:
        file = tmp_path / "lines.jsonl"
        file.write_bytes(data)
        return call("rerank", file, "--clip", by_hand.clip).mistake()

    whole, text, cut = (tmp_path / name for name in ("whole.png", "text.png", "cut.png"))
    whole.write_bytes(picture())
    text.write_text("no picture")
    cut.write_bytes(picture()[:200])

    def line(png: Path) -> bytes:
        return json.dumps({"prompt": "a red star", "png": str(png)}).encode() + b"\n"

    assert "missing.png: cannot be read as a picture" in rerank(line(whole) + line(tmp_path / "missing.png"))
    assert f"{text}: cannot be read as a picture" in rerank(line(text))
    assert f"{cut}: cannot be read as a picture" in rerank(line(cut))
    assert "line 2: not JSON" in rerank(line(whole) + b"nonsense\n")
    assert "line 1: has no 'prompt' and 'png'" in rerank(b'{"prompt": 3}\n')
    assert "line 1: has no 'prompt' and 'png'" in rerank(b"[1, 2]\n")
    assert "line 1: not JSON" in rerank(b"[" * 100_000 + b"\n")
    assert "not text" in rerank(line(whole) + b"\xff\xfe\n")
    assert "holds no sample" in rerank(b"\n\n")
    assert "missing.jsonl" in call("rerank", tmp_path / "missing.jsonl").mistake()
    assert "prompt is not valid Unicode" in rerank(b'{"prompt": "\\ud800", "png": "a.png"}\n')
    (tmp_path / "lines.jsonl").write_bytes(line(whole))
    assert "nowhere: no CLIP there" in call("rerank", tmp_path / "lines.jsonl", "--clip", "nowhere").mistake()


def test_an_empty_pipe_is_one_line() -> None:
    assert "stdin: holds no sample" in run("rerank", "--top", 1, stdin="").mistake()


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(size)`` mounts a file system of so many KiB; a second call gives the same one another size."""
    place = tmp_path / "disk"
    mounted = False

    def resize(kib: int) -> Path:
        nonlocal mounted
        place.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={kib}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("a small file system is mounted with Linux's mount")
    yield resize
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def used_kib(folder: Path) -> int:
    """Return the KiB that a folder takes on a file system of pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full(done: Done, place: Path) -> None:
    refused = done.mistake()
    assert str(place) in refused
    assert "No space left" in refused
    assert "run the same command again" in refused


def test_a_disk_that_fills_while_training(by_hand: Chain, small_disk: Callable[[int], Path]) -> None:
    one = used_kib(by_hand.dvae / "step-00000012")
    out = small_disk(one + one // 2) / "dvae"
    command = ("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", out)
    full(run(*command), out)
    assert [path.name for path in out.glob("step-*")] == ["step-00000004"]
    assert open_checkpoint(out).tensors("ema")
    small_disk(4 * one)
    done = run(*command)
    assert done.code == 0
    assert "resumes from step-00000004" in done.err
    calm = contents(by_hand.dvae / "step-00000012")
    assert contents(out / "step-00000012") == calm


def test_a_disk_that_fills_while_encoding(by_hand: Chain, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    run("make-shapes", shapes, "--n", 640, "--test-n", 1, "--size", 32)
    program = (
        "from dalle_cli.stores import tokens; tokens.ROWS_PER_BLOCK = tokens.ROWS_PER_CHUNK = 64; "
        "from dalle_cli.app import main; main()"
    )

    def encode(store: Path) -> Done:
        command = [sys.executable, "-c", program, "encode-images", by_hand.recipe, "--data", shapes / "train"]
        command += ["--dvae", by_hand.dvae, "--tokens", store]
        done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        return Done(done.returncode, done.stdout, done.stderr)

    calm = tmp_path / "calm.zarr"
    assert encode(calm).code == 0
    store = small_disk(used_kib(calm) * 2 // 3) / "tokens.zarr"
    full(encode(store), store)
    reader, whole = TokenReader(store), TokenReader(calm)
    rows = np.arange(len(reader))
    assert 0 < len(rows) < 640
    np.testing.assert_array_equal(reader.read("image", rows), whole.read("image", rows))
    assert reader.strings("key", rows) == whole.strings("key", rows)
    small_disk(8192)
    assert encode(store).code == 0
    assert contents(store) == contents(calm)


def test_a_disk_that_fills_while_sampling(by_hand: Chain, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    def sample(out: Path) -> Done:
        return run("sample", by_hand.prior, "a red star", "--n", 40, "--batch-size", 4, "--out", out)

    calm = sample(tmp_path / "calm")
    out = small_disk(100) / "samples"
    failed = sample(out)
    full(failed, out)
    assert 0 < len(failed.lines) < 40
    drawn = {line["png"]: Path(line["png"]).read_bytes() for line in failed.lines}
    small_disk(8192)
    done = sample(out)
    assert done.code == 0
    assert done.out == calm.out.replace(str(tmp_path / "calm"), str(out))
    assert {png: Path(png).read_bytes() for png in drawn} == drawn
    # The metadata record where the prior's run lies, as seen from the folder.
    places = {"samples.zarr/zarr.json", "checksums.json"}
    found, wanted = contents(out), contents(tmp_path / "calm")
    assert places < found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted.keys() - places)


def test_a_tar_with_one_broken_member_keeps_the_others(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "some.tar"
    with tarfile.open(file, "w") as tar:
        for name, data in (("a.png", picture()), ("a.txt", b"one"), ("../b.png", picture()), ("c.txt", b"alone")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = call("train-tokenizer", by_hand.recipe, "--data", file, "--out", tmp_path / "words")
    assert done.code == 0
    assert "leads out of the archive" in done.err
    assert "a caption without an image" in done.err


def test_weights_that_are_not_finite_are_never_saved(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    arguments = ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", tmp_path / "prior")
    exploding = ("--set", "prior.training.updates=1", "--set", "prior.learning_rate.warmup_updates=0")
    for rate, what in (("1e39", "weights are not finite after 1 updates, so they are not saved"),
                       ("1e30", "the held-out loss is not finite after 1 updates")):  # fmt: skip
        unseen = ("--set", "prior.training.validation_samples=1") if rate == "1e30" else ("--set", "data.holdout=0")
        message = call(*arguments, *exploding, *unseen, "--set", f"prior.learning_rate.peak={rate}").mistake()
        assert what in message
        assert not list((tmp_path / "prior").glob("step-*"))
    # The advice can be followed.
    assert "lower prior.learning_rate.peak and begin again, with another --out or without this folder" in message
    shutil.rmtree(tmp_path / "prior")
    assert call(*arguments, "--set", "prior.learning_rate.peak=1e-3").code == 0


def test_all_broken_pictures_of_a_reference_are_named_at_once(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    for i in range(12):
        for folder in ("real", "drawn"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i:02d}.png").write_bytes(picture(i))
    for i in (3, 7):
        (tmp_path / "real" / f"{i:02d}.png").write_bytes(b"<html>403</html>")
    arguments = ("eval-fid", tmp_path / "drawn", tmp_path / "real", "--clip", by_hand.clip, "--size", 32)
    message = call(*arguments, "--cache", tmp_path / "cache").mistake()
    assert "2 of 12 pictures cannot be used" in message
    assert "03.png" in message
    assert "07.png" in message


def test_a_world_in_place_of_a_file_and_a_closed_stdin_are_one_line() -> None:
    assert "a file is in the way of a folder" in run("make-shapes", "/dev/null/x", "--n", 10).mistake()
    closed = subprocess.run(["bash", "-c", f"{DALLE} rerank <&-"], env=ENVIRONMENT, capture_output=True, text=True)
    assert closed.returncode == 2
    assert closed.stderr.startswith("dalle: nothing to rerank")


@pytest.mark.parametrize("stage", ["train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior",
                                   "train-clip", "report"])  # fmt: skip
def test_every_stage_takes_the_source_as_an_option(stage: str, call: Call) -> None:
    assert "--data" in call(stage, "--help").out


@pytest.mark.parametrize("stage", ["train-prior", "sample", "make-shapes"])
def test_two_processes_never_write_one_place(by_hand: Chain, call: Call, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    commands: dict[str, tuple[object, ...]] = {
        "train-prior": ("train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", out),
        "sample": ("sample", by_hand.prior, "a large red square", "--out", out),
        "make-shapes": ("make-shapes", out, "--n", 4, "--size", 32),
    }
    with owned(out):
        refused = call(*commands[stage]).mistake()
    assert f"{out}: is being written by process {os.getpid()} on {socket.gethostname()}; wait for it" in refused
    assert call(*commands[stage]).code == 0
    assert not list(tmp_path.glob(".*"))


def test_names_and_captions_steer_no_terminal(tmp_path: Path, call: Call) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"name": hostile, "description": hostile}))
    shown = call("show", recipe)
    assert shown.code == 0, shown.err
    assert r"\x1b[2J" in shown.out
    refused = call("show", tmp_path / f"{hostile}.yaml")
    assert r"\x1b[2J" in refused.mistake()
    assert "\x1b" not in shown.out + shown.err + refused.err
