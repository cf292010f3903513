"""Captions to tokens: BPE, its dropout, several captions a picture, and the text part of a store."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from hashlib import sha256
from itertools import chain, pairwise
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
from helpers.captions import CORPUS, WORDS, Captions, recipe_with, shards_of, uneven
from helpers.running import smallest_recipe, write_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from dalle_cli.clip.model import clip_text_ids
from dalle_cli.clip.train import ClipTask
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import DataSettings, Filters, Recipe, TokenizerSettings
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError
from dalle_cli.prior.train import PriorTask
from dalle_cli.randomness import stream_seed
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.merge import merge_store
from dalle_cli.stores.shards import Shard
from dalle_cli.stores.tokens import PartWriter, TokenReader
from dalle_cli.text import bpe
from dalle_cli.text.bpe import Tokenizer, train_bpe
from dalle_cli.text.bpe_dropout import WIDTHS
from dalle_cli.text.ragged import Ragged
from dalle_cli.text.tokenize import CaptionEncoder, tokenize_source, train_tokenizer

MASK = 2**64 - 1


@cache
def tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return train_bpe(iter(CORPUS), recipe_with().tokenizer, Path(folder))


# A slow reference, from the definition alone: a pair at a time, plain integers, words by the library's own parts


def mixed(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def passes(stream: int, draw: int, p: float) -> int:
    """Pairs that draw number ``draw`` of a stream passes over: a geometric number."""
    value, count, power = mixed((stream + draw * 0x9E3779B97F4A7C15) & MASK) >> 11, 0, p
    while count < WIDTHS[-1] and value < int(power * 2.0**53):
        count, power = count + 1, power * p
    return count


def reference_dropout(words: Tokenizer, caption: str, p: float, stream: int) -> list[int]:
    model = json.loads(words.backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    text = words.backend.normalizer.normalize_str(caption)
    ids, begin = [], 1
    for word, _ in words.backend.pre_tokenizer.pre_tokenize_str(text):
        symbols = list(word)
        for step in range(len(word)):
            pairs = sorted((ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks)
            # A word beyond the limit is left whole.
            passed = passes(stream, begin + step, p) if len(word) <= WIDTHS[-1] else 0
            if passed >= len(pairs):
                break
            i = pairs[passed][1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        begin += len(word)
        ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def dropped(words: Tokenizer, captions: list[str], p: float, streams: list[int]) -> list[list[int]]:
    ids, numbers = words.encode_words(captions)
    found = words.dropout(p).drop(ids, numbers, np.array(streams, np.uint64))
    return [part.tolist() for part in np.split(found.values, np.cumsum(found.counts)[:-1])]


captions_of_any_kind = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join),
    st.text(min_size=1, max_size=40),
    st.sampled_from(["ananananananana", "AAAA aaaa AaAa", "it's  two   spaces", "日本語の説明 ١٢٣ é é"]),
)


@given(
    st.lists(captions_of_any_kind, min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, MASK),
)
@settings(max_examples=120, deadline=None)
@example(["circles " * 3 + "c" * 1500, "of " + "triangles" * 113 + "a", "red" * 342], 0.5, 1)
def test_dropout_is_the_slow_definition(captions: list[str], p: float, stream: int) -> None:
    streams = [(stream + n) & MASK for n in range(len(captions))]
    found = dropped(tokenizer(), captions, p, streams)
    assert found == [
        reference_dropout(tokenizer(), caption, p, one) for caption, one in zip(captions, streams, strict=True)
    ]


def test_dropout_has_the_librarys_distribution() -> None:
    """The library's own dropout, which cannot be seeded, as the peer; both are drawn often enough to tell."""
    n, p, text = 20_000, 0.3, "triangles"
    model = json.loads(tokenizer().backend.to_str())["model"]
    peer = Library(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], dropout=p))
    peer.pre_tokenizer = tokenizer().backend.pre_tokenizer
    theirs = Counter(tuple(e.ids) for e in peer.encode_batch([text] * n, add_special_tokens=False))
    ours = Counter(map(tuple, dropped(tokenizer(), [text] * n, p, [mixed(i) for i in range(n)])))
    assert len(ours) > 20
    for outcome in {*ours, *theirs}:
        expected = (ours[outcome] + theirs[outcome]) / 2
        assert abs(ours[outcome] - theirs[outcome]) < 6 * (2 * expected + 1) ** 0.5


def test_what_a_dropped_caption_spells_stays() -> None:
    for caption, ids in zip(CORPUS, dropped(tokenizer(), CORPUS, 0.4, list(range(len(CORPUS)))), strict=True):
        assert tokenizer().decode(ids).strip() == caption


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6), st.integers(1, 6), st.data())
@settings(max_examples=50, deadline=None)
def test_ragged_is_a_list_of_lists(lists: list[list[int]], width: int, data: st.DataObject) -> None:
    ragged = Ragged(np.array([*chain.from_iterable(lists)], np.int64), np.array([len(one) for one in lists], np.int64))
    which = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8)) if lists else []
    taken = ragged.take(np.array(which, np.int64))
    assert taken.values.tolist() == [*chain.from_iterable(lists[i] for i in which)]
    assert ragged.padded(width, -1).tolist() == [(one + [-1] * width)[:width] for one in lists]


# The tokenizer


def test_captions_are_lower_cased_and_composed() -> None:
    plain, other = tokenizer().encode(["a red café", "A RED cafe\u0301"])
    assert plain == other
    assert tokenizer().decode(plain).strip() == "a red café"


def test_what_a_file_says_of_cutting_padding_and_dropout_is_left_aside(tmp_path: Path) -> None:
    spoiled = Library.from_str(tokenizer().backend.to_str())
    spoiled.enable_truncation(3)
    spoiled.enable_padding(length=3)
    spoiled.model.dropout = 0.5
    spoiled.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CORPUS[:20]) == tokenizer().encode(CORPUS[:20])
    assert loaded.encode_words(CORPUS[:20])[0].values.tolist() == [
        *chain.from_iterable(tokenizer().encode(CORPUS[:20]))
    ]


def test_training_takes_every_caption_in_one_pass(tmp_path: Path) -> None:
    source = Captions([["zebra zebra", "yak yak"], None, ["zebra quagga quagga"]])
    recipe = Recipe(name="t", tokenizer=TokenizerSettings(vocab_size=300))
    learnt = train_tokenizer(recipe, source, tmp_path / "all")
    for word in ("zebra", "yak", "quagga"):
        assert len(learnt.encode([word])[0]) == 1
    again = train_bpe(iter(["zebra zebra", "yak yak", "zebra quagga quagga"]), recipe.tokenizer, tmp_path / "again")
    assert again.identity == learnt.identity
    no_yak = recipe.model_copy(update={"data": DataSettings(filters=Filters(min_characters=8))})
    assert len(train_tokenizer(no_yak, source, tmp_path / "filtered").encode(["yak"])[0]) > 1
    with pytest.raises(UserError, match="no caption to train a tokenizer on"):
        train_tokenizer(recipe, Captions([None]), tmp_path / "none")


# Rows


def reference_rows(
    captions: list[list[str]], config: TokenizerSettings, seed: int, first_row: int
) -> list[dict[str, Any]]:
    """Each row by itself, from the words of the contract."""
    rows = []
    for row, given_ in enumerate(captions, first_row):
        length = config.text_length
        encoded = {caption: tokenizer().encode([caption])[0] for caption in given_}
        kept = [c for c in given_ if encoded[c] and not (config.overlong == "refuse" and len(encoded[c]) > length)]
        epochs = config.dropout_epochs if config.dropout > 0 else 0
        versions = []
        for v in range(max(epochs, len(kept)) if kept else 0):
            ids = encoded[kept[v % len(kept)]]
            if epochs:
                stream = mixed((stream_seed(seed, "bpe-dropout", v) + row * 0x9E3779B97F4A7C15) & MASK)
                ids = reference_dropout(tokenizer(), kept[v % len(kept)], config.dropout, stream)
            versions.append(ids[:length])
        rows.append(
            {
                "text": encoded[kept[0]][:length] if kept else [],
                "versions": versions,
                "caption": kept[0] if kept else (given_ or [""])[0],
                "more": kept[1:],
                "kept": len(kept),
                "overlong": sum(len(encoded[caption]) > length for caption in given_),
            }
        )
    return rows


def tokens_of(text: np.ndarray, length: np.ndarray) -> list[list[int]]:
    assert all(not row[n:].any() for row, n in zip(text, length, strict=True))  # zeros behind the end
    return [row[:n].tolist() for row, n in zip(text, length, strict=True)]


rows_of_captions = st.lists(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join), max_size=4), min_size=1, max_size=7
)
tokenizer_settings = st.builds(
    TokenizerSettings,
    text_length=st.integers(2, 12),
    dropout=st.sampled_from([0.0, 0.3]),
    dropout_epochs=st.integers(0, 3),
    overlong=st.sampled_from(["truncate", "refuse"]),
)


def test_captions_encoded_part_by_part_are_the_same() -> None:
    words = tokenizer()
    ids, (again, numbers) = words.encode_block(CORPUS), words.encode_words(CORPUS)
    with mock.patch.object(bpe, "ENCODED_AT_ONCE", 3):
        for found in (words.encode_block(CORPUS), words.encode_words(CORPUS)[0], again):
            assert found.values.tolist() == ids.values.tolist()
            assert found.counts.tolist() == ids.counts.tolist()
        assert words.encode_words(CORPUS)[1].tolist() == numbers.tolist()
    assert len(words.encode_block([]).values) == 0


@given(rows_of_captions, tokenizer_settings, st.integers(0, 9), st.integers(0, 10**9), st.data())
@settings(max_examples=80, deadline=None)
def test_rows_are_as_the_contract_says(
    captions: list[list[str]], config: TokenizerSettings, seed: int, first_row: int, data: st.DataObject
) -> None:
    expected = reference_rows(captions, config, seed, first_row)
    encoder = CaptionEncoder(tokenizer(), config, seed)
    found = encoder.rows(captions, first_row)
    arrays = found.arrays
    assert tokens_of(arrays["text"], arrays["text_length"]) == [row["text"] for row in expected]
    assert arrays["caption"].tolist() == [row["caption"] for row in expected]
    dropping, several = config.dropout > 0 and config.dropout_epochs > 0, any(row["more"] for row in expected)
    assert ("text_epochs" in arrays) == (dropping or several)
    assert ("more_captions" in arrays) == several
    if several:
        assert [json.loads(more or "[]") for more in arrays["more_captions"]] == [row["more"] for row in expected]
    if "text_epochs" in arrays:
        assert arrays["text_versions"].tolist() == [len(row["versions"]) for row in expected]
        for row, wanted in enumerate(expected):
            versions = tokens_of(arrays["text_epochs"][row], arrays["text_epochs_length"][row])
            assert versions == wanted["versions"] + [[]] * (len(versions) - len(wanted["versions"]))
        assert all(array.dtype == np.uint16 for name, array in arrays.items() if name.startswith("text"))
    refused = [bool(given_) and not row["kept"] for given_, row in zip(captions, expected, strict=True)]
    assert [row in found.reasons for row in range(len(refused))] == refused
    assert set(found.reasons.values()) <= {f"caption of more than {config.text_length} tokens"}
    assert found.counts == {
        "captions": sum(row["kept"] for row in expected),
        "overlong": sum(row["overlong"] for row in expected),
    }
    # A row does not depend on the rows beside it.
    cut = data.draw(st.integers(0, len(captions) - 1))
    alone = encoder.rows(captions[cut:], first_row + cut)
    for name, array in alone.arrays.items():
        part = arrays[name][cut:]
        assert (part[(slice(None), *map(slice, array.shape[1:]))] == array).all()


# The store


def files(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_epoch_takes_its_version_of_each_caption(tmp_path: Path, dropout: float) -> None:
    source, recipe, rows = uneven(21), recipe_with(dropout=dropout, dropout_epochs=2), 21
    with shards_of(4):
        made = tokenize_source(recipe, source, tokenizer(), tmp_path / "t")
        expected = reference_rows([c or [] for c in source.all], recipe.tokenizer, 3, 0)
        reader, at = TokenReader(tmp_path / "t"), np.random.default_rng(0).permutation(rows)
        for epoch in range(9):
            epochs = epoch + np.arange(rows) % 2
            found = tokens_of(*reader.epoch_text(at, epochs))
            for row, e, ids in zip(at, epochs, found, strict=True):
                versions = expected[row]["versions"] or [[]]
                assert ids == versions[e % len(versions)]
        assert tokens_of(reader.read("text", at), reader.read("text_length", at)) == [expected[r]["text"] for r in at]
        assert [json.loads(s or "[]") for s in reader.read("more_captions", at)] == [expected[r]["more"] for r in at]
    assert (made.rows, made.skipped) == (rows, sum(captions is None for captions in source.all))
    assert made.captions == sum(row["kept"] for row in expected)
    assert made.overlong == sum(row["overlong"] for row in expected) > 0
    state = reader.part("text")
    assert state["counts"] == {"captions": made.captions, "overlong": made.overlong}
    group: Any = zarr.open_group(str(tmp_path / "t"), mode="r")
    most = max(len(row["versions"]) for row in expected)
    assert group["text_epochs"].shape == (rows, most, 9)
    assert group["text_versions"].shape == (rows,)
    assert (group["text_epochs"].chunks, group["text_epochs"].shards) == ((2, 1, 9), (4, 1, 9))


def test_one_caption_a_picture_without_dropout_needs_no_more_than_it(tmp_path: Path) -> None:
    source = Captions([[caption] for caption in CORPUS[:10]])
    tokenize_source(recipe_with(dropout=0.0), source, tokenizer(), tmp_path / "t")
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert names == {"zarr.json", "key", "text", "text_length", "caption"}
    reader = TokenReader(tmp_path / "t")
    assert tokens_of(*reader.epoch_text(np.arange(10), np.arange(10))) == [
        ids[:9] for ids in tokenizer().encode(CORPUS[:10])
    ]


def test_shares_join_to_the_bytes_of_one_process(tmp_path: Path) -> None:
    source = uneven(27)
    for dropout in (0.0, 0.3):
        recipe, whole, joined = recipe_with(dropout=dropout), tmp_path / f"w{dropout}", tmp_path / f"j{dropout}"
        with shards_of(4):
            tokenize_source(recipe, source, tokenizer(), whole)
            for number in (3, 1, 2):
                tokenize_source(recipe, source, tokenizer(), joined, Shard(number, 3))
            merge_store(joined)
        assert files(joined) == files(whole)


def test_filtered_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    source = Captions([["red circle", "a tiny red circle"], ["blue"], ["huge"], None])
    recipe = recipe_with(dropout=0.0)
    strict = recipe.model_copy(update={"data": DataSettings(filters=Filters(min_words=3))})
    made = tokenize_source(strict, source, tokenizer(), tmp_path / "t")
    assert (made.rows, made.captions, made.skipped) == (4, 1, 3)
    reader = TokenReader(tmp_path / "t")
    assert reader.strings("caption", range(4)) == ["a tiny red circle", "", "", ""]
    assert reader.part("text")["skipped"] == {"filtered: min_words": 2, "no caption": 1}
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
    assert group.attrs["version"] == 2
    group.attrs["version"] = 1
    for opening in (lambda: TokenReader(tmp_path / "t"), lambda: PartWriter(tmp_path / "t", "text", {})):
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
    """Stands for kill -9."""


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4), st.sampled_from([0.0, 0.3]))
@settings(max_examples=8, deadline=None)
def test_a_store_ends_with_the_same_bytes_wherever_its_writer_died(
    kills: list[tuple[int, int]], dropout: float
) -> None:
    """Within an array's turn of any shard, new arrays and wider ones among them, or before the commit."""
    source, recipe = uneven(23), recipe_with(dropout=dropout, dropout_epochs=2)
    real_array, real_commit = PartWriter._array, PartWriter.commit
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
                mock.patch.object(PartWriter, "_array", array),
                mock.patch.object(PartWriter, "commit", commit),
                suppress(Killed),
            ):
                tokenize_source(recipe, source, tokenizer(), struck)
        tokenize_source(recipe, source, tokenizer(), struck)
        assert files(struck) == files(calm)


# Other processes


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
    attributes = tmp_path / "struck" / "zarr.json"

    def committed() -> int:
        try:
            return int(json.loads(attributes.read_text())["attributes"]["text"]["rows"])
        except (FileNotFoundError, KeyError):
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


# What training sees


def test_both_trainings_draw_a_caption_an_epoch_and_validate_on_the_first(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", n=12, test_n=1, seed=0, size=32)
    recipe = load_recipe(write_recipe(tmp_path, smallest_recipe(tmp_path / "run", tmp_path / "shapes" / "train")))
    recipe = recipe.model_copy(
        update={"tokenizer": TokenizerSettings(vocab_size=400, text_length=48, dropout=0.2, dropout_epochs=2)}
    )
    pictures = open_source(str(recipe.data.train))
    source = Captions([random.Random(row).sample(CORPUS, 1 + row % 3) for row in range(12)])
    tokenize_source(recipe, source, tokenizer(), tmp_path / "t")
    writer = PartWriter(tmp_path / "t", "image", {})
    image = np.random.default_rng(0).integers(0, 16, (12, 4, 4)).astype(np.uint16)
    writer.append([source.key(row) for row in range(12)], {"image": image, "image_ok": np.ones(12, np.uint8)}, {})
    writer.finish()

    reader = TokenReader(tmp_path / "t")
    expected = reference_rows([captions or [] for captions in source.all], recipe.tokenizer, recipe.seed, 0)
    prior = PriorTask(recipe, reader, None)  # type: ignore[arg-type]
    clip = ClipTask(recipe, pictures, reader, None)  # type: ignore[arg-type]
    order, steps, seen = BatchOrder(prior.training_rows, 4, recipe.seed), 12, set()
    for step, tokens_, (_, clip_ids) in zip(range(steps), prior.batches(0, steps), clip.batches(0, steps), strict=True):
        rows, epochs = order.batch(step)
        versions = [expected[row]["versions"] for row in rows]
        texts = [version[e % len(version)] for version, e in zip(versions, epochs, strict=True)]
        assert tokens_of(tokens_.text.numpy(), tokens_.length.numpy()) == texts
        assert torch.equal(tokens_.image, torch.from_numpy(image[rows].reshape(4, 16).astype(np.int64)))
        assert torch.equal(clip_ids, clip_text_ids(tokens_.text, tokens_.length, 400))
        seen |= {(int(row), int(e) % 3) for row, e in zip(rows, epochs, strict=True)}
    assert len(seen) == 3 * len(prior.training_rows)  # every version of every row had its turn
    whole, first = prior.validation, [expected[row]["text"] for row in prior.held_out]
    assert whole is not None
    assert clip.validation is not None
    assert tokens_of(whole.text.numpy(), whole.length.numpy()) == first
    assert torch.equal(clip.validation[1], clip_text_ids(whole.text, whole.length, 400))


# The commands


def test_the_commands_count_what_they_did(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, lines in enumerate([["A red circle", "one circle, red"], ["a blue square " * 30], [], ["a star"]]):
        (data / f"{number}.png").write_bytes(b"never read here")
        (data / f"{number}.txt").write_text("\n".join(lines))
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", data))
    store = tmp_path / "run" / "tokens.zarr"
    assert call("train-tokenizer", recipe).out == f"{tmp_path / 'run' / 'tokenizer' / 'tokenizer.json'}\n"
    done = call("tokenize-text", recipe)
    assert done.out == f"{store}\n"
    last = "4 pictures, 4 captions, 1 pictures skipped, 1 captions of more than 48 tokens cut"
    assert done.err.splitlines()[-1] == f"{store}: {last}"
    assert call("tokenize-text", recipe).err.splitlines()[-1] == f"{store}: {last}"  # finished: the same account
    shutil.rmtree(store)
    done = call("tokenize-text", recipe, "--set", "tokenizer.overlong=refuse")
    last = "4 pictures, 3 captions, 2 pictures skipped, 1 captions of more than 48 tokens refused"
    assert done.err.splitlines()[-1] == f"{store}: {last}"
    lines = [json.loads(line) for line in (store / "skipped-text.jsonl").read_text().splitlines()]
    assert lines == [
        {"key": "1", "reason": "caption of more than 48 tokens"},
        {"key": "2", "reason": "the caption is empty"},
    ]
    share = call("tokenize-text", recipe, "--shard", "1/2").out.strip()
    assert share == str(Shard(1, 2).store(store, "text"))
    assert "--shard 3/2" in call("tokenize-text", recipe, "--shard", "3/2").mistake()
