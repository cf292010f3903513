from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.pictures import noise, write_sample
from helpers.sources import contents, write_tar

from dalle_cli.data.formats.folder import FolderSource
from dalle_cli.data.open_source import expand_braces, open_source
from dalle_cli.data.source import BadSample
from dalle_cli.errors import UserError
from dalle_cli.shapes.scene import random_scene
from dalle_cli.shapes.world import make_shapes, parse_caption


def test_several_shards_keep_equal_names_apart(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"t-{shard:02d}.tar", ("0.png", b"%d" % shard), ("0.txt", b"caption %d" % shard))
    everything = {f"t-{n:02d}/0": (b"%d" % n, f"caption {n}") for n in range(3)}
    source = open_source(tmp_path)
    assert contents(source) == everything
    assert source.describe().endswith("3 samples (3 shards)")
    assert contents(open_source(str(tmp_path / "t-{00..02}.tar"))) == everything
    assert list(contents(open_source(f"{tmp_path}/t-{{00,02}}.tar"))) == ["t-00/0", "t-02/0"]
    with pytest.raises(UserError, match=r"1 of 4 shards missing: .*t-03\.tar"):
        open_source(f"{tmp_path}/t-{{00..03}}.tar")


def test_shards_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "s.tar", ("0.png", folder.encode()))
    source = open_source(f"{tmp_path}/{{a,b}}/s.tar")
    assert [(source.key(i), source.image_bytes(i)) for i in range(2)] == [("a/s/0", b"a"), ("b/s/0", b"b")]


def test_the_shapes_world_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.shapes.writer.ROWS_PER_SHARD", 5)
    make_shapes(tmp_path, n=12, test_n=3, seed=5, size=32)
    source = open_source(tmp_path / "train")
    assert [source.key(i) for i in (0, 11)] == ["shapes-00000/00000000", "shapes-00002/00000011"]
    assert [parse_caption(*source.captions(i)) for i in range(12)] == [
        random_scene(5, "train", i).claim for i in range(12)
    ]
    with pytest.raises(UserError, match="in folders below it; name one of heldout, seen, train"):
        open_source(tmp_path)


def test_refusals_name_the_path_and_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder$"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=rf"^nowhere: no such file or folder; paths are relative to .*, now {Path.cwd()}$"
    ):
        open_source("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images found \(looked for avif, bmp"):
        open_source(tmp_path / "empty")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.zip: not a known kind of source"):
        open_source(tmp_path / "a.zip")
    path = write_tar(tmp_path / "t" / "captions.tar", ("a.txt", b"a"))
    with pytest.raises(UserError, match=r"captions\.tar: no samples found \(looked for .*a caption without an image"):
        open_source(path)
    (tmp_path / "t" / "a.png").write_bytes(b"A")
    with pytest.raises(UserError, match="both shards"):
        open_source(tmp_path / "t")


def test_brace_patterns() -> None:
    assert expand_braces("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("plain") == ["plain"]
    for wrong in ("{3..1}", "{a..c}", "{0..99999999}", "{000..999}{000..999}{0..9}"):
        with pytest.raises(UserError):
            expand_braces(wrong)


def test_pipes_among_the_files_of_a_folder_hold_up_nothing(tmp_path: Path) -> None:
    write_sample(tmp_path / "pictures", "a", noise(40, 40))
    (tmp_path / "pictures" / "a.txt").unlink()
    for name in ("metadata.csv", "list.jsonl", "list.csv", "table.parquet", "b.png", "a.txt", "yfcc100m_dataset"):
        os.mkfifo(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "annotations").mkdir()
    os.mkfifo(tmp_path / "pictures" / "annotations" / "captions_x.json")
    source = open_source(tmp_path / "pictures")
    assert [source.key(i) for i in range(len(source))] == ["a"]
    with pytest.raises(BadSample, match="no caption"):
        source.captions(0)
    for name in ("list.jsonl", "list.csv", "table.parquet", "b.png"):
        with pytest.raises(UserError, match=f"{name}: not a known kind of source"):
            open_source(tmp_path / "pictures" / name)


def test_absolute_and_relative_shards_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "s.tar", ("0.png", b"1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="some paths begin with a / and others do not; write all alike"):
        open_source(f"{{{tmp_path}/a,b}}/s.tar")
    with pytest.raises(UserError, match="is not a range"):
        expand_braces(f"a-{{0..{'9' * 5000}}}")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_folder_that_cannot_be_listed_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for folder in ("a", "b"):
        write_sample(tmp_path / folder, "1", noise(40, 40), "a caption")
    whole, real, left = FolderSource(tmp_path), os.scandir, 2
    monkeypatch.setattr("dalle_cli.data.source.PAUSES", (0.0, 0.0))

    def scandir(path: Path) -> Any:
        nonlocal left
        if Path(path).name == "b" and left:
            left -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    again = FolderSource(tmp_path)
    assert (len(again), again.identity, again.skipped) == (2, whole.identity, [])
    left = 9
    with pytest.raises(UserError, match=r"b: cannot be read any more .*; see to its disk"):
        FolderSource(tmp_path)
    left, number = 9, errno.EACCES
    assert FolderSource(tmp_path).skipped == [("b/", "the folder cannot be read: Permission denied")]
