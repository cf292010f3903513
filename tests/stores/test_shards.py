"""Shares of a token store made apart and merged: the same files, byte for byte, as a store made by one process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from conftest import Call
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.errors import UserError
from dalle_cli.stores import merge, tokens
from dalle_cli.stores.merge import merge_store
from dalle_cli.stores.shards import WHOLE, Part, Shard, parse_shard, parts_folder
from dalle_cli.stores.tokens import PartWriter, TokenReader

FILE = 4  # rows of a shard file here
IDENTITY = {"source": "shapes", "seed": 0}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


@contextmanager
def small_files() -> Iterator[None]:
    with (
        mock.patch.object(tokens, "ROWS_PER_SHARD", FILE),
        mock.patch.object(tokens, "ROWS_PER_CHUNK", FILE // 2),
        mock.patch.object(merge, "ROWS_PER_SHARD", FILE),
    ):
        yield


def key(row: int) -> str:
    return f"key-{row}"


def arrays(part: Part, rows: range) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, int]]:
    """Values, skips and counts of ``rows``, a function of their numbers; some are skipped, some files are empty."""
    skipped = {key(row): f"reason {row % 3}" for row in rows if row % 5 == 2}
    counts = {"captions": len(rows), "odd": sum(row % 2 for row in rows)}
    ok = np.array([row % 5 != 2 for row in rows])
    if part == "image":
        filled = [row // FILE % 3 != 1 for row in rows]  # every third file holds nothing but zeros
        image = np.array([[[row, row + 1], [7, 9]] for row in rows], np.uint16) * ok[:, None, None]
        return {"image": image * np.array(filled)[:, None, None], "image_ok": ok.astype(np.uint8)}, skipped, counts
    found = {
        "text": np.array([[row, 3, 5] for row in rows], np.uint16) * ok[:, None],
        "text_length": ok.astype(np.uint16) * 3,
        "caption": np.array([f"caption {row} ☃" * (row % 3) for row in rows], dtype=object),
    }
    versions = max(row // FILE % 4 for row in rows)  # as with captions: files differ in how many a picture has
    if versions:
        found["text_epochs"] = np.array([[[row, v, 1] for v in range(1, versions + 1)] for row in rows], np.uint16)
        found["text_epochs_length"] = np.full((len(rows), versions), 3, np.uint16)
        found["text_versions"] = np.full(len(rows), versions, np.uint16)
    return found, skipped, counts


def make(store: Path, part: Part, samples: int, shard: Shard = WHOLE, until: int | None = None) -> PartWriter:
    writer = PartWriter(store, part, IDENTITY, shard)
    todo = writer.check_source(samples)
    for start in range(todo.start, todo.stop, FILE):
        if until is not None and start >= until:
            return writer
        rows = range(start, min(start + FILE, todo.stop))
        found, skipped, counts = arrays(part, rows)
        writer.append([key(row) for row in rows], found, skipped, counts)
    if not writer.complete:
        writer.finish()
    return writer


def make_shares(store: Path, part: Part, samples: int, of: int) -> None:
    for number in range(of, 0, -1):
        make(store, part, samples, Shard(number, of))


def files(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


# How the work is split


@given(samples=st.integers(0, 10**6), multiple=st.integers(1, 5000), of=st.integers(1, 300))
def test_shards_part_the_rows(samples: int, multiple: int, of: int) -> None:
    shares = [Shard(number, of).rows(samples, multiple) for number in range(1, of + 1)]
    assert shares[0].start == 0
    assert shares[-1].stop == samples
    assert all(one.stop == two.start for one, two in itertools.pairwise(shares))
    assert all(share.start % multiple == 0 or share.start == samples for share in shares)
    whole_files = [-(-len(share) // multiple) for share in shares]
    assert max(whole_files) - min(whole_files) <= 1


def test_shards_are_counted_from_one() -> None:
    assert parse_shard("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"
    for wrong in ("0/8", "9/8", "3", "3/0", "a/b", "-1/2", "1/8/2", " 1/8", "1/8\n", "", "0/0", "٣/٨"):
        with pytest.raises(UserError, match=r"I/N with I from 1 to N"):
            parse_shard(wrong)
    place = Shard(3, 8).store(Path("runs/tokens.zarr"), "image")
    assert place == Path("runs/tokens.zarr.parts/image-0003-of-0008.zarr")
    assert WHOLE.store(Path("runs/tokens.zarr"), "image") == Path("runs/tokens.zarr")


# Joining


@given(
    samples=st.integers(1, 45),
    text=st.integers(1, 7),
    image=st.integers(1, 7),
    text_first=st.booleans(),
    kills=st.lists(st.integers(0, 60), max_size=3),
    links=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_merged_store_is_the_unsharded_one(
    samples: int, text: int, image: int, text_first: bool, kills: list[int], links: bool
) -> None:
    splits: dict[Part, int] = {"text": text, "image": image}
    order: list[Part] = ["text", "image"] if text_first else ["image", "text"]
    with TemporaryDirectory() as folder, small_files():
        calm, store = Path(folder) / "calm.zarr", Path(folder) / "tokens.zarr"
        for part in order:
            make(calm, part, samples)
            make_shares(store, part, samples, splits[part])
            if splits[part] > 1:
                for kill in kills:
                    merge_and_die(store, kill)
                with mock.patch.object(os, "link", os.link if links else mock.Mock(side_effect=OSError)):
                    merge_store(store)
        assert files(store) == files(calm)
        shutil.rmtree(parts_folder(store), ignore_errors=True)
        reader = TokenReader(store)
        reader.require_complete()
        for name, values in arrays("image", range(samples))[0].items():
            np.testing.assert_array_equal(reader.read(name, np.arange(samples)), values)


def merge_and_die(store: Path, when: int) -> None:
    """Merge, and die at one of the moments that touch the disk."""
    moments = iter(range(when + 1))

    def step(real):  # type: ignore[no-untyped-def]
        def dying(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(moments, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return dying

    with (
        mock.patch.object(merge.os, "link", step(os.link)),  # type: ignore[attr-defined]
        mock.patch.object(merge, "_write", step(merge._write)),
        mock.patch.object(PartWriter, "commit", step(PartWriter.commit)),
        mock.patch.object(PartWriter, "finish", step(PartWriter.finish)),
        contextlib.suppress(Killed),
    ):
        merge_store(store)


def test_nothing_is_copied_and_the_shares_stay_whole(tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files():
        make_shares(store, "image", 30, 3)
        before = files(parts_folder(store))
        assert merge_store(store) == {"image": 30}
        assert files(parts_folder(store)) == before
        data = [path for path in store.rglob("c/*") if path.is_file()] + list(store.glob("image/c/*/0/0"))
        assert len(data) == 3 * 8
        assert all(path.stat().st_nlink == 2 for path in data)
        whole = files(store)
        assert merge_store(store) == {"image": 30}  # again: nothing to do
        shutil.rmtree(parts_folder(store) / "image-0002-of-0003.zarr")
        make(store, "image", 30, Shard(2, 3))  # and a share may be made anew
        assert merge_store(store) == {"image": 30}
        assert files(store) == whole


def test_a_share_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    store, shard = tmp_path / "tokens.zarr", Shard(2, 3)
    with small_files():
        make_shares(store, "text", 40, 3)
        calm = files(shard.store(store, "text"))
        shutil.rmtree(shard.store(store, "text"))
        rows = shard.rows(40, FILE)
        assert len(rows) > FILE
        begun = make(store, "text", 40, shard, until=rows.start + FILE)
        assert (begun.rows, begun.complete) == (FILE, False)
        with pytest.raises(UserError, match=r"text-0002-of-0003.zarr: is unfinished, .* 4 rows; .*--shard 2/3 with"):
            merge_store(store)
        make(store, "text", 40, shard)
        assert files(shard.store(store, "text")) == calm


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "no shares to join"),
        ("missing", r"image-0002-of-0003\.zarr: is missing; run dalle encode-images --shard 2/3"),
        ("two splits", "image shares of several splits, of 3 and of 4; delete those of all but one"),
        ("other dVAE", r"image-0003-of-0003\.zarr: was made with dvae 'b', image-0001-of-0003\.zarr with 'a'"),
        ("more samples", "was made with samples 31"),
        ("renamed", "does not hold shard 2/3"),
        ("skips", "skipped-image.jsonl is not whole"),
        ("begun alone", "its image part stops at row 4, where none of .*parts begins"),
        ("done alone", "its image part has 28 rows, the source now 30"),
        ("other store", "its image part was made with dvae 'c', now 'a'"),
        ("other keys", "row 0 is 'another' in the store and 'key-0' in the source"),
        ("unfinished text", "its text part is unfinished"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    store = tmp_path / "tokens.zarr"
    parts = parts_folder(store)

    def made_by(dvae: str) -> None:
        monkeypatch.setitem(IDENTITY, "dvae", dvae)

    with small_files():
        made_by("a")
        if fault != "none":
            make_shares(store, "image", 30, 3)
        if fault == "missing":
            shutil.rmtree(parts / "image-0002-of-0003.zarr")
        elif fault == "two splits":
            make(store, "image", 30, Shard(4, 4))
        elif fault == "more samples":
            shutil.rmtree(parts / "image-0003-of-0003.zarr")
            make(store, "image", 31, Shard(3, 3))
        elif fault == "renamed":
            shutil.rmtree(parts / "image-0002-of-0003.zarr")
            shutil.copytree(parts / "image-0001-of-0003.zarr", parts / "image-0002-of-0003.zarr")
        elif fault == "skips":
            (parts / "image-0001-of-0003.zarr" / "skipped-image.jsonl").unlink()
        elif fault == "begun alone":
            make(store, "image", 30, until=4)
        elif fault == "done alone":
            make(store, "image", 28)
        elif fault == "other keys":
            writer = PartWriter(store, "text", {})
            writer.append(["another"] * 4, arrays("text", range(4))[0], {})
            writer.finish()
        elif fault == "unfinished text":
            make(store, "text", 30, until=4)
        elif fault == "other dVAE":
            shutil.rmtree(parts / "image-0003-of-0003.zarr")
            made_by("b")
            make(store, "image", 30, Shard(3, 3))
        elif fault == "other store":
            made_by("c")
            make(store, "image", 30)
        before = files(store) if store.exists() else {}
        with pytest.raises(UserError, match=words):
            merge_store(store)
        if fault not in ("other keys",):
            assert (files(store) if store.exists() else {}) == before


def test_a_share_of_another_size_of_the_source_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files():
        make(store, "image", 30, Shard(1, 3))
        with pytest.raises(UserError, match=r"begun as shard 1/3 of 30 samples, now 1/3 of 31"):
            make(store, "image", 31, Shard(1, 3))


def test_the_command_prints_the_store(tmp_path: Path, call: Call) -> None:
    store = tmp_path / "tokens.zarr"
    assert "no shares to join" in call("merge", store).mistake()
    with small_files():
        make_shares(store, "image", 9, 5)  # more processes than files: some shares hold nothing
        done = call("merge", store)
    assert (done.code, done.out) == (0, f"{store}\n")
    assert "9 rows of image" in done.err
    assert f"{store}.parts is no longer needed" in done.err


# The report of skips


def test_the_report_of_skips_is_only_ever_appended_to(tmp_path: Path) -> None:
    with small_files():
        writer = PartWriter(tmp_path / "t", "image", IDENTITY)
        report = writer.path / "skipped-image.jsonl"
        sizes = []
        real = Path.open

        def opened(self: Path, mode: str = "r", *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            assert self != report or mode == "a", "what is committed is read again"
            return real(self, mode, *args, **kwargs)

        with mock.patch.object(Path, "open", opened):
            for start in range(0, 80, FILE):
                rows = range(start, start + FILE)
                skips = {key(row): "broken" for row in rows}
                writer.append([key(row) for row in rows], arrays("image", rows)[0], skips)
                sizes.append(report.stat().st_size)
    assert sizes == sorted(sizes)
    assert [json.loads(line)["key"] for line in report.read_text().splitlines()] == [key(row) for row in range(80)]


def test_what_a_killed_run_reported_beyond_its_rows_is_cut(tmp_path: Path) -> None:
    with small_files():
        make(tmp_path / "calm", "image", 24)
        make(tmp_path / "struck", "image", 24, until=8)
        report = tmp_path / "struck" / "skipped-image.jsonl"
        committed = report.read_text()
        report.write_text(committed + '{"key": "key-12", "reason": "reason 0"}\n{"key": "key-1')
        make(tmp_path / "struck", "image", 24, until=8)
        assert report.read_text() == committed
        make(tmp_path / "struck", "image", 24)
    assert files(tmp_path / "struck") == files(tmp_path / "calm")


def test_many_kinds_of_skips_keep_the_attributes_small(tmp_path: Path) -> None:
    reasons = {key(row): f"{row} x {row} pixels" for row in range(300)}

    def append(writer: PartWriter, rows: range) -> None:
        keys = [key(row) for row in rows]
        values = {"image": np.zeros((len(rows), 2, 2), np.uint16), "image_ok": np.zeros(len(rows), np.uint8)}
        writer.append(keys, values, {k: reasons[k] for k in keys})

    with mock.patch.object(tokens, "ROWS_PER_SHARD", 100), mock.patch.object(merge, "ROWS_PER_SHARD", 100):
        for store, shards in ((tmp_path / "calm", [WHOLE]), (tmp_path / "tokens", [Shard(1, 2), Shard(2, 2)])):
            for shard in shards:
                writer = PartWriter(store, "image", IDENTITY, shard)
                todo = writer.check_source(300)
                for start in range(todo.start, todo.stop, 100):
                    append(writer, range(start, start + 100))
                writer.finish()
        merge_store(tmp_path / "tokens")
    counts = TokenReader(tmp_path / "calm").part("image")["skipped"]
    assert sum(counts.values()) == 300
    assert len(counts) == tokens.MOST_REASONS + 1
    assert counts[tokens.OTHER_REASONS] == 200
    assert files(tmp_path / "tokens") == files(tmp_path / "calm")
