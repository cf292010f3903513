"""Tokenizing a source: the tokenizer's training, the text part of a store, and what training reads of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import zarr
from conftest import Call
from helpers import captions
from helpers.captions import CORPUS, Captions, recipe_with, shards_of, uneven
from helpers.running import smallest_recipe, write_recipe
from helpers.text_reference import as_lists, reference_epoch, reference_rows, tokenizer, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.clip.model import clip_text_ids
from dalle_cli.clip.train import ClipTask
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import DataSettings, Filters, Recipe, TokenizerSettings
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.captions import MOST_CAPTIONS, source_captions
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError
from dalle_cli.prior.train import PriorTask
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.shards import Shard
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.encode import CaptionEncoder
from dalle_cli.text.tokenize import tokenize_source, train_tokenizer
from dalle_cli.text.training_captions import TrainingCaptions


def test_training_takes_every_caption_in_one_pass(tmp_path: Path) -> None:
    source = Captions([["zebra zebra", "yak yak"], None, ["zebra quagga quagga"]])
    recipe = Recipe(name="t", tokenizer=TokenizerSettings(vocab_size=300))
    learnt = train_tokenizer(recipe, source, tmp_path / "all")
    for word in ("zebra", "yak", "quagga"):
        assert learnt.encode([word]).counts.tolist() == [1]
    again = train_bpe(iter(["zebra zebra", "yak yak", "zebra quagga quagga"]), recipe.tokenizer, tmp_path / "again")
    assert again.identity == learnt.identity
    no_yak = recipe.model_copy(update={"data": DataSettings(filters=Filters(min_characters=8))})
    assert len(train_tokenizer(no_yak, source, tmp_path / "filtered").encode(["yak"]).values) > 1
    with pytest.raises(UserError, match="no caption to train a tokenizer on"):
        train_tokenizer(recipe, Captions([None]), tmp_path / "none")


def test_a_tokenizer_of_some_captions_reads_no_others(tmp_path: Path) -> None:
    """Samples that are read are spread over the whole source, and the same every time."""
    source, read = Captions([[f"word{row}"] for row in range(5000)]), []
    real = source.captions

    def captions(row: int) -> list[str]:
        read.append(row)
        return real(row)

    recipe = recipe_with(dropout=0.0, vocab_size=400)
    with mock.patch.object(source, "captions", captions):
        first = train_tokenizer(recipe, source, tmp_path / "a", 500)
        rows = read.copy()
        assert train_tokenizer(recipe, source, tmp_path / "b", 500).identity == first.identity
        assert read == rows * 2
        assert 430 < len(rows) < 570  # 3.3 standard deviations of a binomial distribution
        assert len(set(np.array(rows) // 500)) == 10
        read.clear()
        assert train_tokenizer(recipe, source, tmp_path / "c", 5000).identity != first.identity
        assert read == list(range(5000))


def files(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_epoch_takes_its_version_of_each_caption(tmp_path: Path, dropout: float) -> None:
    source, recipe, rows = uneven(21), recipe_with(dropout=dropout), 21
    with shards_of(4):
        made = tokenize_source(recipe, source, tokenizer(), tmp_path / "t")
        expected = reference_rows([c or [] for c in source.all], recipe.tokenizer)
        reader, at = TokenReader(tmp_path / "t"), np.random.default_rng(0).permutation(rows)
        captions = TrainingCaptions(reader)
        for epoch in range(9):
            epochs = epoch + np.arange(rows) % 2
            found = tokens_of(*captions.read(at, epochs))
            for row, e, ids in zip(at.tolist(), epochs.tolist(), found, strict=True):
                assert ids == reference_epoch(expected[row]["usable"], recipe.tokenizer, recipe.seed, row, e)
        assert tokens_of(reader.read("text", at), reader.read("text_length", at)) == [expected[r]["text"] for r in at]
        assert reader.captions(at) == [expected[r]["usable"] for r in at]
    assert (made.rows, made.skipped) == (rows, sum(captions is None for captions in source.all))
    assert made.captions == sum(len(row["usable"]) for row in expected)
    assert made.overlong == sum(row["overlong"] for row in expected) > 0
    state = reader.part("text")
    assert state.counts == {"captions": made.captions, "overlong": made.overlong}
    group: Any = zarr.open_group(str(tmp_path / "t"), mode="r")
    assert ("text_epochs" in group) == (dropout == 0)
    if dropout:
        return
    most = max(len(row["versions"]) for row in expected)
    assert group["text_epochs"].shape == (rows, most, 9)
    assert group["text_versions"].shape == (rows,)
    assert (group["text_epochs"].chunks, group["text_epochs"].shards) == ((2, 1, 9), (4, 1, 9))


def test_one_caption_a_picture_without_dropout_needs_no_more_than_it(tmp_path: Path) -> None:
    source = Captions([[caption] for caption in CORPUS[:10]])
    tokenize_source(recipe_with(dropout=0.0), source, tokenizer(), tmp_path / "t")
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert names == {"zarr.json", "checksums.json", "key", "text", "text_length", "caption"}
    reader = TokenReader(tmp_path / "t")
    assert tokens_of(*reader.epoch_text(np.arange(10), np.arange(10))) == [
        ids[:9] for ids in as_lists(tokenizer().encode(CORPUS[:10]))
    ]


def test_shares_join_to_the_bytes_of_one_process(tmp_path: Path) -> None:
    source = uneven(27)
    for dropout in (0.0, 0.3):
        recipe, whole, joined = recipe_with(dropout=dropout), tmp_path / f"w{dropout}", tmp_path / f"j{dropout}"
        with shards_of(4):
            tokenize_source(recipe, source, tokenizer(), whole)
            for number in (3, 1, 2):
                tokenize_source(recipe, source, tokenizer(), joined, Shard(number, 3))
        assert files(joined) == files(whole)


def test_filtered_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    source = Captions([["red circle", "a tiny red circle"], ["blue"], ["huge"], None])
    recipe = recipe_with(dropout=0.0)
    strict = recipe.model_copy(update={"data": DataSettings(filters=Filters(min_words=3))})
    made = tokenize_source(strict, source, tokenizer(), tmp_path / "t")
    assert (made.rows, made.captions, made.skipped) == (4, 1, 3)
    reader = TokenReader(tmp_path / "t")
    assert reader.strings("caption", range(4)) == ["a tiny red circle", "", "", ""]
    assert reader.part("text").skipped == {"filtered: min_words": 2, "no caption": 1}
    lines = [json.loads(line) for line in (tmp_path / "t" / "skipped-text.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["key-1", "key-2", "key-3"]
    with pytest.raises(UserError, match="made with filters"):
        tokenize_source(recipe, source, tokenizer(), tmp_path / "t")


def test_a_tokenizer_larger_than_the_recipe_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 290 tokens, tokenizer.vocab_size is 289"):
        tokenize_source(recipe_with(vocab_size=289), Captions([["a"]]), tokenizer(), tmp_path / "t")


def test_a_store_of_the_first_format_is_refused(tmp_path: Path) -> None:
    tokenize_source(recipe_with(), Captions([["a"]]), tokenizer(), tmp_path / "t")
    group: Any = zarr.open_group(str(tmp_path / "t"), mode="a")
    assert group.attrs["version"] == 3
    group.attrs["version"] = 1
    for opening in (lambda: TokenReader(tmp_path / "t"), lambda: PartWriter(tmp_path / "t", "text", {}, 1)):
        with pytest.raises(UserError, match="format 1; delete it and make it again") as refused:
            opening()
        assert str(tmp_path / "t") in str(refused.value)


def test_an_error_in_reading_or_encoding_ends_the_command(tmp_path: Path) -> None:
    source = Captions([["a"]] * 3)
    with mock.patch.object(source, "key", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        tokenize_source(recipe_with(), source, tokenizer(), tmp_path / "a")
    with mock.patch.object(CaptionEncoder, "rows", side_effect=MemoryError), pytest.raises(MemoryError):
        tokenize_source(recipe_with(), source, tokenizer(), tmp_path / "b")


class Killed(BaseException):
    """Stands in for kill -9."""


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4), st.sampled_from([0.0, 0.3]))
@settings(max_examples=8)
def test_a_store_ends_with_the_same_bytes_wherever_its_writer_died(
    kills: list[tuple[int, int]], dropout: float
) -> None:
    """It dies after any array of any shard is made or widened, or before a commit."""
    source, recipe = uneven(23), recipe_with(dropout=dropout)
    real_array, real_commit = PartWriter._open_array, PartWriter._commit
    with TemporaryDirectory() as folder, shards_of(4):
        calm, struck = Path(folder) / "calm", Path(folder) / "struck"
        tokenize_source(recipe, source, tokenizer(), calm)
        for shard, point in kills:
            left = [point]

            def die(self: PartWriter, shard: int = shard, left: list[int] = left) -> None:
                left[0] -= self.rows == 4 * shard
                if left[0] < 0:
                    raise Killed

            def array(self: PartWriter, *given: Any, die: Any = die) -> Any:
                made = real_array(self, *given)
                die(self)
                return made

            def commit(self: PartWriter, *given: Any, die: Any = die) -> None:
                die(self)
                real_commit(self, *given)

            with (
                mock.patch.object(PartWriter, "_open_array", array),
                mock.patch.object(PartWriter, "_commit", commit),
                suppress(Killed),
            ):
                tokenize_source(recipe, source, tokenizer(), struck)
        tokenize_source(recipe, source, tokenizer(), struck)
        assert files(struck) == files(calm)


def child(rows: int, out: Path, words: Path, *train: str, **environment: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, Path(captions.__file__), str(rows), out, words, *train]
    return subprocess.Popen(program, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)


def test_processes_and_threads_change_no_byte(tmp_path: Path) -> None:
    variants = {"one": {"RAYON_NUM_THREADS": "1"}, "four": {"RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": "7"}}
    variants["none"] = {"TOKENIZERS_PARALLELISM": "false"}
    running = [
        child(40, tmp_path / name / "t", tmp_path / name, "train", **environment)
        for name, environment in variants.items()
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert files(tmp_path / "one") == files(tmp_path / "four") == files(tmp_path / "none")
    assert "tokenizer.json" in files(tmp_path / "one")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    rows, kills, rng = 2400, 20, random.Random(0)
    assert child(rows, tmp_path / "calm", tmp_path / "words", "train").wait(300) == 0

    def committed() -> int:
        try:
            return TokenReader(tmp_path / "struck").part("text").rows
        except UserError:
            return 0

    stood = []
    for number in range(kills):
        process, goal = child(rows, tmp_path / "struck", tmp_path / "words"), number * rows // (kills + 1)
        while process.poll() is None and committed() <= goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        stood.append(committed())
    assert len(set(stood)) == kills
    assert stood[-1] < rows
    assert child(rows, tmp_path / "struck", tmp_path / "words").wait(300) == 0
    assert files(tmp_path / "struck") == files(tmp_path / "calm")


def test_both_trainings_draw_a_caption_an_epoch_and_validate_on_the_first(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", n=12, test_n=1, seed=0, size=32)
    recipe = load_recipe(write_recipe(tmp_path, smallest_recipe(tmp_path / "run", tmp_path / "shapes" / "train")))
    recipe = recipe.model_copy(update={"tokenizer": TokenizerSettings(vocab_size=400, text_length=48, dropout=0.2)})
    pictures = open_source(str(recipe.data.train))
    source = Captions([random.Random(row).sample(CORPUS, 1 + row % 3) for row in range(12)])
    tokenize_source(recipe, source, tokenizer(), tmp_path / "t")
    image = np.random.default_rng(0).integers(0, 16, (12, 4, 4)).astype(np.uint16)
    with PartWriter(tmp_path / "t", "image", {}, 12) as writer:
        writer.append([source.key(row) for row in range(12)], {"image": image, "image_ok": np.ones(12, np.uint8)}, {})
        writer.finish()

    reader = TokenReader(tmp_path / "t")
    words, seed = recipe.tokenizer, recipe.seed
    expected = reference_rows([captions or [] for captions in source.all], words)
    prior = PriorTask(recipe, reader, None)  # type: ignore[arg-type]
    clip = ClipTask(recipe, pictures, reader, None)  # type: ignore[arg-type]
    order, steps, seen = BatchOrder(prior.training_rows, 4, recipe.seed), 12, set()
    for step, tokens_, (_, clip_ids) in zip(range(steps), prior.batches(0, steps), clip.batches(0, steps), strict=True):
        rows, epochs = order.batch(step)
        places = zip(rows.tolist(), epochs.tolist(), strict=True)
        texts = [reference_epoch(expected[row]["usable"], words, seed, row, e) for row, e in places]
        assert tokens_of(tokens_.text.numpy(), tokens_.length.numpy()) == texts
        assert torch.equal(tokens_.image, torch.from_numpy(image[rows].reshape(4, 16).astype(np.int64)))
        assert torch.equal(clip_ids, clip_text_ids(tokens_.text, tokens_.length, 400))
        seen |= {(int(row), int(e) % 3) for row, e in zip(rows, epochs, strict=True)}
    assert len(seen) == 3 * len(prior.training_rows)  # every caption of every row had its turn
    whole, first = prior.validation, [expected[row]["text"] for row in prior.held_out]
    assert whole is not None
    assert clip.validation is not None
    assert tokens_of(whole.text.numpy(), whole.length.numpy()) == first
    assert torch.equal(clip.validation[1], clip_text_ids(whole.text, whole.length, 400))


def test_the_commands_count_what_they_did(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, lines in enumerate([["A red circle", "one circle, red"], ["a blue square " * 30], [], ["a star"]]):
        (data / f"{number}.png").write_bytes(b"never read here")
        (data / f"{number}.txt").write_text("\n".join(lines))
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", data))
    store = tmp_path / "run" / "tokens.zarr"
    trained = call("train-tokenizer", recipe)
    assert trained.out == f"{tmp_path / 'run' / 'tokenizer' / 'tokenizer.json'}\n"
    assert "train-tokenizer: 1 of 4 samples skipped; the first is 2: " in trained.err
    done = call("tokenize-text", recipe)
    assert done.out == f"{store}\n"
    last = "4 pictures, 4 captions, 1 pictures skipped, 1 captions of more than 48 tokens cut"
    assert f"{store}: {last}" in done.err.splitlines()
    assert f"{store}: {last}" in call("tokenize-text", recipe).err.splitlines()  # finished: the same account
    shutil.rmtree(store)
    done = call("tokenize-text", recipe, "--set", "tokenizer.overlong=refuse")
    last = "4 pictures, 3 captions, 2 pictures skipped, 1 captions of more than 48 tokens refused"
    assert f"{store}: {last}" in done.err.splitlines()
    lines = [json.loads(line) for line in (store / "skipped-text.jsonl").read_text().splitlines()]
    assert lines == [
        {"key": "1", "reason": "caption of more than 48 tokens"},
        {"key": "2", "reason": "the caption is empty"},
    ]
    shutil.rmtree(store)
    done = call("tokenize-text", recipe, "--shard", "1/2")
    assert done.out == f"{store}\n"
    assert f"{store}: share 1/2 of its text part is complete; unfinished: 2/2" in done.err
    assert "--shard 3/2" in call("tokenize-text", recipe, "--shard", "3/2").mistake()


def test_captions_beyond_the_hundredth_of_a_picture_are_left_out_and_counted(tmp_path: Path) -> None:
    """One file of thousands of lines makes no other row larger."""
    source = Captions([["red circle"], [f"line {i}" for i in range(3000)]])
    made = tokenize_source(recipe_with(dropout=0.0), source, tokenizer(), tmp_path / "t")
    assert (made.captions, made.left_out) == (1 + MOST_CAPTIONS, 3000 - MOST_CAPTIONS)
    group: Any = zarr.open_group(str(tmp_path / "t"), mode="r")
    assert group["text_epochs"].shape[1] == MOST_CAPTIONS
    assert len(list(source_captions(source))) == 1 + MOST_CAPTIONS
