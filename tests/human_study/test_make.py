"""dalle human-study make: what a study tells annotators, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Call
from helpers.human_study_folder import SIZE, small_study, write_pictures
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle_cli.human_study.make import StudyRequest, make_study
from dalle_cli.human_study.study import Study, load_key, load_study


def test_a_study_shows_each_pair_and_tells_nothing_of_its_systems(tmp_path: Path) -> None:
    names = [str(number) for number in range(1, 9)]
    (tmp_path / "captions.txt").write_text("\n".join(f"caption {name}" for name in names))
    mine = write_pictures(tmp_path / "mine", names, 0)
    theirs = write_pictures(tmp_path / "theirs", names, 1)
    for name in names:  # what would tell: metadata, a smooth picture's few bytes
        theirs[name] = np.full((SIZE, SIZE, 3), int(name), np.uint8)
        note = PngInfo()
        note.add_text("Software", "theirs")
        Image.fromarray(theirs[name]).save(tmp_path / "theirs" / f"{name}.png", pnginfo=note)
    systems = {"mine": str(tmp_path / "mine"), "theirs": str(tmp_path / "theirs")}
    out = tmp_path / "study"
    study = make_study(StudyRequest(systems, tmp_path / "captions.txt", image_size=SIZE), out)
    key = load_key(out, study)
    assert load_study(out) == study
    assert list(key.systems) == ["mine", "theirs"]

    shown = {}
    for item in study.pairs:
        caption_id = key.items[item.id].caption_id
        assert item.caption == f"caption {caption_id}"
        for side, system in (("left", key.items[item.id].left), ("right", key.items[item.id].right)):
            with Image.open(out / "pictures" / getattr(item, side)) as picture:
                assert picture.info == {}
                assert len(picture.getexif()) == 0
                expected = {"mine": mine, "theirs": theirs}[system][caption_id]
                assert np.array_equal(np.asarray(picture), expected)
            shown[caption_id, system] = getattr(item, side)
    assert len(shown) == 16 == len(set(shown.values()))
    assert Counter(entry.left for entry in key.items.values()) == {"mine": 4, "theirs": 4}

    pictures = sorted((out / "pictures").iterdir())
    assert len({picture.stat().st_size for picture in pictures}) == 1
    assert {picture.name for picture in pictures} == {name for item in study.items for name in (item.left, item.right)}
    served = (out / "study.json").read_text()
    assert not any(word in served for word in ("mine", "theirs", str(tmp_path)))
    assert [item.id for item in study.items] == sorted(item.id for item in study.items)


def test_checks_put_one_of_the_pictures_beside_noise(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, checks=6)
    key, sources = load_key(out, study), {}
    for system in ("mine", "theirs"):
        for picture in (tmp_path / system).iterdir():
            with Image.open(picture) as image:
                sources[np.asarray(image).tobytes()] = f"caption number {picture.stem}", system
    assert len(study.checks) == 6
    assert Counter(item.check for item in study.checks) == {"left": 3, "right": 3}
    systems: Counter[str] = Counter()
    for item in study.checks:
        assert item.id not in key.items
        good, noise = (item.left, item.right) if item.check == "left" else (item.right, item.left)
        with Image.open(out / "pictures" / good) as image:
            caption, system = sources[np.asarray(image).tobytes()]
        assert caption == item.caption
        systems[system] += 1
        with Image.open(out / "pictures" / noise) as image:
            assert np.asarray(image).tobytes() not in sources
            assert np.asarray(image).std() > 60
    assert systems == {"mine": 3, "theirs": 3}


def test_the_same_request_makes_the_same_bytes_and_another_seed_other_sides(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=12)
    systems = {"mine": str(tmp_path / "mine"), "theirs": str(tmp_path / "theirs")}

    def again(name: str, **settings: Any) -> tuple[Study, dict[str, str]]:
        request = StudyRequest(systems, tmp_path / "captions.txt", image_size=SIZE, **settings)
        made = make_study(request, tmp_path / name)
        return made, {entry.caption_id: entry.left for entry in load_key(tmp_path / name, made).items.values()}

    again("again")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / file.relative_to(out)).read_bytes() == file.read_bytes()
    sides = {entry.caption_id: entry.left for entry in load_key(out, study).items.values()}
    other, other_sides = again("other", seed=1)
    assert other_sides.keys() == sides.keys()
    assert other_sides != sides
    assert {item.id for item in other.items}.isdisjoint(item.id for item in study.items)
    fewer, fewer_sides = again("fewer", pairs=5)
    assert len(fewer.pairs) == 5 == len(fewer_sides)
    assert fewer_sides.keys() < sides.keys()


def test_pictures_of_any_size_and_format_are_shown_in_one(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a\nb\n")
    write_pictures(tmp_path / "mine", ["1", "2"], 0, size=16)
    write_pictures(tmp_path / "theirs", ["0001", "0002"], 1, size=48)
    for picture in (tmp_path / "theirs").iterdir():
        with Image.open(picture) as image:
            image.crop((0, 0, 48, 40)).save(picture.with_suffix(".JPG"), format="JPEG")
        picture.unlink()
    systems = {"mine": str(tmp_path / "mine"), "theirs": str(tmp_path / "theirs")}
    make_study(StudyRequest(systems, tmp_path / "captions.txt", image_size=24), tmp_path / "study")
    for picture in (tmp_path / "study" / "pictures").iterdir():
        with Image.open(picture) as image:
            assert (image.size, image.mode, image.format) == ((24, 24), "RGB", "PNG")


def test_lines_of_sample_and_rerank_belong_by_their_prompts(tmp_path: Path, call: Call) -> None:
    pictures = write_pictures(tmp_path / "drawn", [f"{p}-{i}" for p in "ab" for i in range(3)], 0)

    def lines(name: str, *chosen: tuple[str, str, int | None]) -> Path:
        file = tmp_path / name
        entries = [
            {"prompt": f"picture {p}", "png": str(tmp_path / "drawn" / f"{p}-{i}.png")} | ({"rank": r} if r else {})
            for p, i, r in chosen
        ]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return file

    sampled = lines("sampled.jsonl", ("a", "0", None), ("a", "1", None), ("b", "0", None), ("b", "1", None))
    ranked = lines("ranked.jsonl", ("b", "1", 2), ("b", "2", 1), ("a", "2", 1), ("a", "0", 2))
    (tmp_path / "captions.txt").write_text("picture a\npicture b\n\n  picture a\npicture never drawn\n")
    out = tmp_path / "study"
    arguments = ("--captions", tmp_path / "captions.txt", "--size", SIZE)
    done = call(
        "human-study",
        "make",
        out,
        "--system",
        f"one={sampled}",
        "--system",
        f"best={ranked}",
        *arguments,
        "--checks",
        0,
    )
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert "1 captions are repeated" in done.err
    assert "1 of 3 captions have no picture" in done.err
    study = load_study(out)
    key = load_key(out, study)
    assert key.captions_left_out == 1
    assert not study.checks
    found = {}
    for item in study.items:
        for side in ("left", "right"):
            with Image.open(out / "pictures" / getattr(item, side)) as image:
                found[item.caption, getattr(key.items[item.id], side)] = np.asarray(image).tobytes()
    assert found == {
        ("picture a", "one"): pictures["a-0"].tobytes(),
        ("picture b", "one"): pictures["b-0"].tobytes(),
        ("picture a", "best"): pictures["a-2"].tobytes(),
        ("picture b", "best"): pictures["b-2"].tobytes(),
    }

    doubled = lines("doubled.jsonl", ("a", "0", 1), ("a", "1", 1), ("b", "0", 1))
    refused = call(
        "human-study", "make", tmp_path / "x", "--system", f"one={sampled}", "--system", f"best={doubled}", *arguments
    ).mistake()
    assert "doubled.jsonl" in refused
    assert "'picture a'" in refused


def test_systems_of_other_captions_are_refused_by_example(tmp_path: Path, call: Call) -> None:
    write_pictures(tmp_path / "mine", ["1", "2", "3"], 0)
    write_pictures(tmp_path / "theirs", ["1", "3"], 1)
    write_pictures(tmp_path / "strangers", ["x7", "x8"], 1)
    (tmp_path / "captions.txt").write_text("a red cat\na blue dog\na green bird\n")

    def make(*systems: str, captions: str = "captions.txt", out: str = "study") -> str:
        given = [part for system in systems for part in ("--system", system)]
        message = call("human-study", "make", tmp_path / out, *given, "--captions", tmp_path / captions).mistake()
        assert not (tmp_path / out).exists() or out != "study"
        return message

    mine, theirs = f"mine={tmp_path / 'mine'}", f"theirs={tmp_path / 'theirs'}"
    for systems in ((mine, theirs), (theirs, mine)):
        refused = make(*systems)
        assert "system theirs" in refused
        assert "caption 2 ('a blue dog')" in refused
        assert "1 such captions" in refused
    refused = make(mine, f"strangers={tmp_path / 'strangers'}")
    assert "none of the 2 pictures" in refused
    assert "'x7'" in refused
    assert "('1', 'a red cat')" in refused
    assert "two systems, not 1" in make(mine)
    assert "two systems, not 3" in make(mine, theirs, f"again={tmp_path / 'mine'}")
    assert "is given twice" in make(mine, mine)
    assert "NAME=PICTURES" in make(str(tmp_path / "mine"), theirs)
    assert "neither a folder" in make(mine, f"theirs={tmp_path / 'nowhere'}")
    assert "nowhere.txt" in make(mine, theirs, captions="nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no caption" in make(mine, theirs, captions="empty.txt")

    (tmp_path / "theirs" / "2.png").write_bytes(b"no picture")
    assert str(tmp_path / "theirs" / "2.png") in make(mine, theirs)
    write_pictures(tmp_path / "twice", ["1", "01"], 1)
    assert "01.png and 1.png both belong to caption 1" in make(mine, f"twice={tmp_path / 'twice'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "votes.sqlite").write_bytes(b"kept")
    assert "exists" in make(mine, theirs, out="full")
    assert (tmp_path / "full" / "votes.sqlite").read_bytes() == b"kept"
    refused = call("human-study", "make", tmp_path / "study", "--system", mine, "--system", f"same={tmp_path / 'mine'}",
                   "--captions", tmp_path / "captions.txt", "--pairs", 4).mistake()  # fmt: skip
    assert "--pairs 4" in refused
    assert "only 3" in refused
