"""A comparison in shares comes to what one comparison finds, in whatever order the shares are made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import Call
from helpers.near_duplicates import jpeg, photo

from dalle_cli.data.open_source import open_source
from dalle_cli.data.overlap import pairs
from dalle_cli.data.overlap.search import Comparison, find_overlap
from dalle_cli.data.overlap.shares import overlap_share
from dalle_cli.errors import UserError
from dalle_cli.stores.shards import Shard

HOW = Comparison(max_pixels=10**8, workers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two folders of photographs with copies within the first and between the two."""
    root = tmp_path_factory.mktemp("folders")
    pictures = {f"a{seed:02d}": photo(seed) for seed in range(12)}
    pictures |= {f"b{seed:02d}": jpeg(photo(seed)) for seed in range(0, 12, 3)} | {"c05": photo(5)}
    others = {f"e{seed:02d}": jpeg(photo(seed)) for seed in range(8, 16)}
    for name, there in (("train", pictures), ("eval", others)):
        (root / name).mkdir()
        for key, picture in there.items():
            picture.save(root / name / f"{key}.png")
            (root / name / f"{key}.txt").write_text("a picture")
    return root / "train", root / "eval"


@pytest.mark.parametrize("between", [False, True])
def test_shares_find_what_one_process_finds(
    between: bool, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, other = open_source(str(folders[0])), open_source(str(folders[1])) if between else None
    whole = find_overlap(train, other, tmp_path / "whole", HOW)
    assert len(whole.matches) == 5
    monkeypatch.setattr(pairs, "_BLOCK", 2)  # so that each share has pictures
    cache = tmp_path / "shares"
    first = [overlap_share(train, other, cache, Shard(i, 3), HOW) for i in (2, 3, 1)]
    assert first == [None, None, None]
    assert len(list(cache.glob("*.pairs/*.json"))) == 1  # the last one found all thumbnails, and compared its share
    assert overlap_share(train, other, cache, Shard(2, 3), HOW) is None
    joined = overlap_share(train, other, cache, Shard(3, 3), HOW)
    assert joined is not None
    assert joined.to_json_lines() == whole.to_json_lines()
    assert joined.summary() == whole.summary()
    monkeypatch.setattr("dalle_cli.data.overlap.shares.near_duplicates", None)  # which is not called again
    again = overlap_share(train, other, cache, Shard(1, 3), HOW)
    assert again is not None
    assert again.to_json_lines() == whole.to_json_lines()


def test_shares_that_do_not_belong_together_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train = open_source(str(folders[0]))
    for i in (1, 2, 1):
        overlap_share(train, None, tmp_path, Shard(i, 2), HOW)
    with pytest.raises(UserError, match="is of another number of shares than 3; delete such files"):
        overlap_share(train, None, tmp_path, Shard(1, 3), HOW)
    with pytest.raises(UserError, match=r"0001-of-0002.json: was made with other similarity; make all shares alike"):
        overlap_share(train, None, tmp_path, Shard(2, 2), Comparison(HOW.max_pixels, 1, 0.9))
    (marks,) = tmp_path.glob("*-0002-of-0002.marks")
    whole = marks.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    for content in (b"", whole[:-1], bytes(flipped)):
        marks.write_bytes(content)
        with pytest.raises(UserError, match=r"marks: is damaged \(\w+\); delete it and make share 2/2 again"):
            overlap_share(train, None, tmp_path, Shard(1, 2), HOW)


def test_a_share_of_thumbnails_that_was_killed_is_resumed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train = open_source(str(folders[0]))
    overlap_share(train, None, tmp_path, Shard(1, 2), HOW)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    (thumbnails,), (marks,) = tmp_path.glob("*.thumbnails"), tmp_path.glob("*.marks")
    thumbnails.write_bytes(files[thumbnails][:10000])
    marks.unlink()
    overlap_share(train, None, tmp_path, Shard(1, 2), HOW)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_command(call: Call, folders: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("overlap", *folders, "--workers", 1)
    assert "--shard needs --cache" in call(*arguments, "--shard", "1/2").mistake()
    mistake = call(*arguments, "--shard", "1/2", "--cache", tmp_path, "--features", "x").mistake()
    assert "--shard is for the comparison of hashes" in mistake
    done = [call(*arguments, "--shard", f"{i}/2", "--cache", tmp_path / "cache") for i in (1, 2, 1)]
    assert [each.code for each in done] == [0, 0, 0]
    assert [each.out for each in done[:2]] == ["", ""]
    assert "thumbnails of share 1/2 are made; still to be made: 2/2; then run all shares again" in done[0].err
    assert "share 2/2 is compared; still to be compared: 1/2" in done[1].err
    assert done[2].out == call(*arguments).out != ""


def test_pairs_of_other_marks_are_not_joined(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Numbers of pictures mean other pictures once thumbnails are made anew with other limits."""
    train = open_source(str(folders[0]))
    for i in (1, 2, 1):
        overlap_share(train, None, tmp_path, Shard(i, 2), HOW)
    with pytest.raises(UserError, match=r"0001-of-0002.json: was made with other max_pixels; make all shares alike"):
        overlap_share(train, None, tmp_path, Shard(2, 2), Comparison(2 * HOW.max_pixels, 1, HOW.threshold))
    (marks,) = tmp_path.glob("*-0002-of-0002.marks")
    made_anew = bytearray(marks.read_bytes()[:-32])
    made_anew[-1] ^= 1
    marks.write_bytes(made_anew + hashlib.sha256(made_anew).digest())
    with pytest.raises(UserError, match=r"0001-of-0002.json: was made with other marks; make all shares alike"):
        overlap_share(train, None, tmp_path, Shard(2, 2), HOW)
