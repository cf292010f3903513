"""Writing a token store: what is committed is what was written, whatever was interrupted."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zarr
from helpers.shares import small_files
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.errors import UserError
from dalle_cli.stores import files
from dalle_cli.stores.shards import WHOLE, Shares
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows

TEXT = 3
IDENTITY = {"source": "shapes", "seed": 0, "share": 0.1}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def text_rows(start: int, stop: int, seed: int = 0) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
    """Rows that are a function of their number: keys, arrays and reasons of those skipped."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 65536, (200, TEXT), dtype=np.uint16)[start:stop]
    lengths = rng.integers(0, TEXT + 1, 200).astype(np.uint16)[start:stop]
    keys = [f"key-{row}" for row in range(start, stop)]
    captions = np.array([f"caption {row} \u00e9\u2603" * (row % 3) for row in range(start, stop)], dtype=object)
    skipped = {key: f"reason {n % 2}" for n, (key, length) in enumerate(zip(keys, lengths, strict=True)) if length == 0}
    return keys, {"text": ids, "text_length": lengths, "caption": captions}, skipped


def die_at(writer: PartWriter, rows: tuple[Any, ...], point: int) -> None:
    """Begin to append ``rows`` and die: while the arrays are opened (0, 1, 2 ...), or just before the commit."""
    real, calls = writer._open_array, iter(range(100))

    def array(*given: Any) -> Any:
        if next(calls) == point:
            raise Killed
        return real(*given)

    with (
        mock.patch.object(writer, "_open_array", array),
        mock.patch.object(writer, "_commit", side_effect=Killed),
        pytest.raises(Killed),
    ):
        writer.append(*rows)


def check(path: Path, committed: int) -> None:
    reader = TokenReader(path)
    assert len(reader) == committed
    order = np.random.default_rng(1).permutation(committed)
    keys, arrays, skipped = text_rows(0, committed)
    np.testing.assert_array_equal(reader.read("text", order), arrays["text"][order])
    np.testing.assert_array_equal(reader.read("text_length", order), arrays["text_length"][order])
    assert reader.strings("key", order) == [keys[row] for row in order]
    assert reader.strings("caption", order) == [arrays["caption"][row] for row in order]
    assert sum(reader.part("text").skipped.values()) == len(skipped)
    report = path / "skipped-text.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    assert [line["key"] for line in lines][: len(skipped)] == list(skipped)


@given(
    shard=st.sampled_from([2, 4, 6]),
    rows=st.integers(1, 23),
    kills=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 5)), max_size=4),
)
@settings(max_examples=40)
def test_a_store_reads_back_as_written_wherever_its_writer_died(
    shard: int, rows: int, kills: list[tuple[int, int]]
) -> None:
    with TemporaryDirectory() as folder, small_files(shard):
        path = Path(folder) / "tokens.zarr"
        deaths = dict(kills)
        complete = False
        while not complete:
            with PartWriter(path, "text", IDENTITY, rows) as writer:
                assert writer.rows % shard == 0 or writer.rows == rows
                while some := writer.todo[:shard]:
                    point = deaths.pop(some.start // shard, None)
                    if point is not None:
                        die_at(writer, text_rows(some.start, some.stop), point)
                        if some.start:
                            check(path, some.start)
                        break
                    writer.append(*text_rows(some.start, some.stop))
                else:
                    writer.finish()
                    complete = True
        check(path, rows)
        with PartWriter(path, "text", IDENTITY, rows) as again:
            assert again.complete
            assert again.rows == rows


@given(shard=st.sampled_from([2, 4]), rows=st.integers(1, 11), wrong=st.data())
@settings(max_examples=15)
def test_the_second_part_must_hold_the_same_keys(shard: int, rows: int, wrong: st.DataObject) -> None:
    row = wrong.draw(st.integers(0, rows - 1))
    with TemporaryDirectory() as folder, small_files(shard):
        path = Path(folder) / "tokens.zarr"
        with PartWriter(path, "text", IDENTITY, rows) as first:
            while some := first.todo[:shard]:
                first.append(*text_rows(some.start, some.stop))
            first.finish()

        def append(writer: PartWriter, keys: list[str]) -> None:
            while some := writer.todo[:shard]:
                image = np.arange(some.start * 4, some.stop * 4, dtype=np.uint16).reshape(-1, 2, 2)
                writer.append(
                    keys[some.start : some.stop], {"image": image, "image_ok": np.ones(len(some), np.uint8)}, {}
                )

        keys = text_rows(0, rows)[0]
        with (
            PartWriter(path, "image", IDENTITY, rows) as second,
            pytest.raises(UserError, match=f"row {row} is 'key-{row}' in the store and 'another'"),
        ):
            append(second, [*keys[:row], "another", *keys[row + 1 :]])
        assert second.rows == row // shard * shard
        with pytest.raises(UserError, match=f"text part has {rows} samples, the source now has {rows + 1}; both"):
            PartWriter(path, "image", IDENTITY, rows + 1)
        with PartWriter(path, "image", IDENTITY, rows) as second:
            with pytest.raises(ValueError, match="are still to be appended"):
                second.finish()
            append(second, keys)
            with pytest.raises(ValueError, match="end after share 1/1"):
                second.append(["one too many"], {"image": np.zeros((1, 2, 2), np.uint16)}, {})
            second.finish()
        reader = TokenReader(path)
        reader.require_complete()
        image = reader.read("image", np.arange(rows))
        np.testing.assert_array_equal(image.ravel(), np.arange(4 * rows))
        lengths = text_rows(0, rows)[1]["text_length"]
        np.testing.assert_array_equal(usable_rows(reader), np.flatnonzero(lengths))


def test_a_reader_of_a_growing_store_sees_committed_rows_only(tmp_path: Path) -> None:
    with small_files(4), PartWriter(tmp_path / "t", "text", IDENTITY, 12) as writer:
        with pytest.raises(UserError, match="has no image part"):
            TokenReader(tmp_path / "t").part("image")
        writer.append(*text_rows(0, 4))
        early = TokenReader(tmp_path / "t")
        writer.append(*text_rows(4, 8))
        assert len(early) == 4
        assert len(TokenReader(tmp_path / "t")) == 8
        with pytest.raises(UserError, match="its text part stops at row 8; run dalle tokenize-text again to finish it"):
            TokenReader(tmp_path / "t").require_complete()
        assert early.read("text", np.array([], np.int64)).shape == (0, TEXT)


@pytest.mark.parametrize("change", [{"source": "other"}, {"seed": 1}, {"share": 0.2}, {"new": 1}])
def test_a_store_begun_otherwise_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    for _ in range(2):
        with PartWriter(tmp_path / "t", "text", IDENTITY, 4):
            pass
    name = next(iter(change))
    with pytest.raises(UserError, match="was made from" if name == "source" else f"made with {name} ") as refused:
        PartWriter(tmp_path / "t", "text", {**IDENTITY, **change}, 4)
    assert str(tmp_path / "t") in str(refused.value)


def test_leavings_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    with small_files(4):
        with PartWriter(tmp_path / "t", "text", IDENTITY, 8) as writer:
            writer.append(*text_rows(0, 4))
        left = [
            tmp_path / "t" / "text" / "c" / "1" / "0.123.partial",
            *(tmp_path / "t" / name / "c" / "1.123.partial" for name in ("key", "text_length")),
            *(tmp_path / "t" / name / "zarr.123.partial" for name in (".", "text")),
        ]
        for file in left:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"half")
        with PartWriter(tmp_path / "t", "text", IDENTITY, 8) as writer:
            writer.append(*text_rows(4, 8))
            writer.finish()
    assert not any(file.exists() for file in left)
    assert not (tmp_path / "t" / "progress").exists()
    check(tmp_path / "t", 8)


@pytest.mark.parametrize("inside", ["a.txt", "zarr.json"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, inside: str) -> None:
    if inside == "zarr.json":
        zarr.create_group(str(tmp_path / "t"))
    else:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / inside).write_text("mine")
    with pytest.raises(UserError, match="is no token store; choose another --tokens"):
        PartWriter(tmp_path / "t", "text", IDENTITY, 8)
    assert [path.name for path in (tmp_path / "t").iterdir()] == [inside]


@pytest.mark.parametrize("damage", ["nothing", '{"key": "a"}', "[" * 10**5, "[1]", "7", "\0" * 40])
def test_a_damaged_list_of_skipped_samples_is_one_line(tmp_path: Path, damage: str) -> None:
    """A power cut may leave zeros in a file that grew."""
    path = tmp_path / "tokens"
    keys, arrays, skipped = text_rows(0, 20)
    with PartWriter(path, "text", IDENTITY, 20) as writer:
        writer.append(keys, arrays, skipped)
        report = path / "skipped-text.jsonl"
        lines = report.read_text().splitlines()
        report.write_text("\n".join([damage, *lines[1:]]) + "\n")
        with pytest.raises(UserError, match=f"skipped-text.jsonl: lists {len(skipped) - 1} of {len(skipped)} skipped"):
            writer.finish()


def test_what_lies_among_the_files_of_progress_is_no_share(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with PartWriter(path, "text", IDENTITY, 20):
        for name in ("text-0000-of-0000.json", "text-0005-of-0003.json", "text-1-of-2.json"):
            (path / "progress" / name).write_text("{}")
        assert Shares(path, "text").begun() == [WHOLE]


def test_one_writer_sweeps_nothing_that_another_is_writing(tmp_path: Path) -> None:
    """Completing the text must not delete the file that the writer of the images is about to rename."""
    path = tmp_path / "tokens"
    keys, arrays, skipped = text_rows(0, 20)
    real, swept = files.rename_synced, []

    def wait_for_the_sweep(beside: Path, place: Path) -> None:
        sweep = pool.submit(writer._keep_usable_rows)
        time.sleep(0.2)
        swept.append((sweep, beside.exists()))
        real(beside, place)

    with PartWriter(path, "text", IDENTITY, 20) as writer, ThreadPoolExecutor(1) as pool:
        writer.append(keys, arrays, skipped)
        writer.finish()
        with PartWriter(path, "image", IDENTITY, 20) as images:
            ok = {"image": np.zeros((20, 2, 2), np.uint16), "image_ok": np.ones(20, np.uint8)}
            images.append(keys, ok, {})
            checksums = path / "checksums.json"
            with mock.patch("dalle_cli.stores.token_writer.write_checksums") as write, images._common_lock():
                write.side_effect = lambda *_: wait_for_the_sweep(beside, checksums)
                beside = path / ".checksums.json.4711"
                beside.write_text(checksums.read_text())
                images._write_checksums()
            ((sweep, there),) = swept
            assert there
            sweep.result(timeout=30)
