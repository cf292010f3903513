"""Tests of Parquet files that hold the pictures themselves, against what other libraries wrote into them."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Call
from helpers.pictures import noise
from helpers.running import smallest_recipe, write_recipe

from dalle_cli.data.formats import embedded
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError


def jpeg_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(40, 36, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def contents(source: Source) -> dict[str, tuple[bytes, list[str]]]:
    return {source.key(i): (source.image_bytes(i), source.captions(i)) for i in range(len(source))}


def write_hub(path: Path, rows: dict[str, list[str]], *, names: bool = True, group: int = 2) -> None:
    """Write rows (file name, captions) in the Hub's layout, with row groups of ``group`` rows."""
    images = [{"bytes": name.encode(), "path": name if names else None} for name in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "captions": list(rows.values()), "class": ["c"] * len(rows)})
    pq.write_table(table, path, row_group_size=group)


def test_the_hub_s_layout(tmp_path: Path) -> None:
    write_hub(tmp_path / "data" / "train-00000-of-00002.parquet", {"a.jpg": ["an a", "the a"], "b.png": ["a b"]})
    write_hub(tmp_path / "data" / "train-00001-of-00002.parquet", {"c.jpg": ["a c"], "d.jpg": ["a d"], "e.jpg": ["e"]})
    write_hub(tmp_path / "data" / "test-00000-of-00001.parquet", {"f.jpg": ["an f"]})
    train = {
        "a": (b"a.jpg", ["an a", "the a"]),
        "b": (b"b.png", ["a b"]),
        "c": (b"c.jpg", ["a c"]),
        "d": (b"d.jpg", ["a d"]),
        "e": (b"e.jpg", ["e"]),
    }
    source = open_source(tmp_path)
    assert contents(source) == contents(open_source(tmp_path / "data")) == train
    assert contents(pickle.loads(pickle.dumps(source))) == train
    assert source.describe() == f"parquet {tmp_path}: 5 samples (2 files, split train)"
    assert contents(open_source(f"{tmp_path}:test")) == {"f": (b"f.jpg", ["an f"])}
    assert contents(open_source(tmp_path / "data" / "test-00000-of-00001.parquet")) == {"f": (b"f.jpg", ["an f"])}
    with pytest.raises(UserError, match=r"has no split validation \(its splits: test, train\); name one after a colon"):
        open_source(f"{tmp_path}:validation")


def test_several_splits_without_train_must_be_named(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        write_hub(tmp_path / f"{split}.parquet", {f"{split}.jpg": ["x"]})
    with pytest.raises(UserError, match=r"has no split train \(its splits: dev, test\)"):
        open_source(tmp_path)
    assert list(contents(open_source(f"{tmp_path}:dev"))) == ["dev"]


def test_img2dataset_s_parquet_output(tmp_path: Path) -> None:
    """img2dataset marks failed rows by a status and gives its shards numbers for names."""
    for shard, pictures in enumerate(([b"A", None, b"C"], [None], [b"E"])):
        keys = [f"{shard:05d}{row:04d}" for row in range(len(pictures))]
        table = {
            "url": ["https://x/y.jpg"] * len(keys),
            "key": keys,
            "caption": [f"caption {key}" for key in keys],
            "status": ["success" if picture else "failed_to_download" for picture in pictures],
            "jpg": pa.array(pictures, pa.binary()),
        }
        pq.write_table(pa.table(table), tmp_path / f"{shard:05d}.parquet")
    source = open_source(tmp_path)
    assert contents(source) == {
        key: (data, [f"caption {key}"]) for key, data in [("000000000", b"A"), ("000000002", b"C"), ("000020000", b"E")]
    }
    left_out = ("00000.parquet, row 2", "00001.parquet, row 1")
    assert source.skipped == [(row, "holds no picture") for row in left_out]


def test_keys_without_names_are_row_numbers(tmp_path: Path) -> None:
    write_hub(tmp_path / "train.parquet", {"a.jpg": ["x"], "b.jpg": ["y"]}, names=False)
    assert list(contents(open_source(tmp_path))) == ["00000000", "00000001"]
    for part in range(2):
        write_hub(tmp_path / "two" / f"train-{part}.parquet", {"same.jpg": ["x"]})
    assert list(contents(open_source(tmp_path / "two"))) == ["train-0/00000000", "train-1/00000000"]


def test_repeated_and_empty_keys_are_refused(tmp_path: Path) -> None:
    for ids, message in (([1, 2, 1], "the id '1' stands for two pictures"), ([1, None, 2], "row 2: the id is empty")):
        pq.write_table(pa.table({"id": ids, "png": [b"x"] * 3, "text": ["x"] * 3}), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "t.parquet")


def test_few_row_groups_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "CACHED_BYTES", 100)
    names = {f"{i:02d}{'x' * 40}.jpg": [str(i)] for i in range(12)}
    write_hub(tmp_path / "t.parquet", names, group=2)
    source = open_source(tmp_path / "t.parquet")
    read: list[int] = []
    opened = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **rest: (read.append(i), opened(self, i, **rest))[1]
    )
    order = [0, 1, 11, 5, 5, 4, 0, 11]
    assert [source.image_bytes(i) for i in order] == [list(names)[i].encode() for i in order]
    assert read == [0, 5, 2, 0, 5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"]}, "has no column of captions"),
        ({"image": [b"x"], "caption": [1.5]}, "the column caption holds double, not text"),
        (
            {"image": pa.array([None], pa.binary()), "caption": ["x"]},
            "holds no pictures; left out: .*row 1: holds no picture",
        ),
    ],
)
def test_useless_files_are_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "t.parquet")


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", {"a.jpg": ["x"]})
    source = open_source(tmp_path / "t.parquet")
    write_hub(tmp_path / "t.parquet", {"a.jpg": ["x"], "b.jpg": ["y"]})
    with pytest.raises(UserError, match="has changed since it was indexed"):
        source.image_bytes(0)
    with pytest.raises(UserError, match="has changed since it was indexed"):
        source.captions(0)


def test_a_folder_of_paths_is_no_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"A")
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["an a"]}), tmp_path / "metadata.parquet")
    assert contents(open_source(tmp_path)) == {"a": (b"A", ["an a"])}


def test_the_commands_take_a_folder_of_parquet_with_pictures(call: Call, tmp_path: Path) -> None:
    """The layout of the Hub goes through scan, overlap and the stages, with a split of its own for validation."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, seeds in {"train": range(12), "validation": range(12, 16)}.items():
        images = [{"bytes": jpeg_bytes(seed), "path": f"{split}-{seed}.jpg"} for seed in seeds]
        captions = [[f"picture {seed}", f"number {seed}"] for seed in seeds]
        file = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": pa.array(images, kind), "captions": captions}), file)
    folder = tmp_path / "set"
    scanned = json.loads(call("scan", folder, "--json", "--workers", 1).out)
    assert (scanned["samples"], scanned["captions"], scanned["kept"]) == (12, 24, 12)
    assert call("overlap", folder, f"{folder}:validation", "--workers", 1).out == ""
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", folder))
    split = ("--set", f"data.validation={folder}:validation", "--set", "data.holdout=0")
    for command in ("train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior", "train-clip"):
        done = call(command, recipe, *split)
        assert done.code == 0, (command, done.err)
    drawn = call("sample", tmp_path / "run", "--held-out", "--limit", 2, "--n", 1)
    assert [line["prompt"] for line in drawn.lines] == ["picture 12", "picture 13"]
