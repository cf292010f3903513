"""dalle human-study make and report: what is blinded, what is refused, and the figures against other computations."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from helpers.human_study_folder import SIZE, small_study, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle_cli.data.captions import read_captions
from dalle_cli.errors import UserError
from dalle_cli.human_study.agreement import fleiss_kappa, sign_test, wilson
from dalle_cli.human_study.make import StudyRequest, make_study
from dalle_cli.human_study.results import count_votes, figures
from dalle_cli.human_study.study import QUESTIONS, Study, load_key, load_study
from dalle_cli.human_study.votes import Refused, Vote, Votes, annotator_name

# --- statistics

FLEISS_EXAMPLE = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip
"""The worked example of textbooks: 14 annotators, 10 items, 5 categories, kappa 0.210."""


def test_kappa_of_the_textbooks_example() -> None:
    found = fleiss_kappa(np.array(FLEISS_EXAMPLE))
    assert found is not None
    assert found.kappa is not None
    assert round(found.kappa, 3) == 0.210
    assert round(found.observed, 3) == 0.378


@given(st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=6), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_kappa_is_what_counting_pairs_of_votes_gives(items: list[list[int]]) -> None:
    found = fleiss_kappa(np.array([[votes.count(category) for category in range(3)] for votes in items]))
    judged = [votes for votes in items if len(votes) >= 2]
    if not judged:
        assert found is None
        return
    shares = [np.mean([one == other for one, other in permutations(votes, 2)]) for votes in judged]
    pooled = [vote for votes in judged for vote in votes]
    by_chance = np.mean([one == other for one in pooled for other in pooled])
    assert found is not None
    assert found.observed == pytest.approx(np.mean(shares))
    if len(set(pooled)) == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx((np.mean(shares) - by_chance) / (1 - by_chance), abs=1e-9)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=100, deadline=None)
def test_wilson_is_its_closed_form(case: tuple[int, int]) -> None:
    wins, of = case
    share, z = wins / of, 1.959963984540054
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    found = wilson(wins, of)
    assert found is not None
    assert found.value == share
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_shares_of_nothing_and_the_sign_test() -> None:
    assert wilson(0, 0) is None
    assert sign_test(0, 0) is None
    # Two-sided, of a fair coin: 9 or 10 heads or tails of 10.
    assert sign_test(9, 10) == pytest.approx(2 * (10 + 1) / 2**10)


# --- make


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
    assert "1 captions come again" in done.err
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
    assert "01.png and 1.png are both of caption 1" in make(mine, f"twice={tmp_path / 'twice'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "votes.sqlite").write_bytes(b"kept")
    assert "exists" in make(mine, theirs, out="full")
    assert (tmp_path / "full" / "votes.sqlite").read_bytes() == b"kept"
    refused = call("human-study", "make", tmp_path / "study", "--system", mine, "--system", f"same={tmp_path / 'mine'}",
                   "--captions", tmp_path / "captions.txt", "--pairs", 4).mistake()  # fmt: skip
    assert "--pairs 4" in refused
    assert "only 3" in refused


def test_captions_of_json_lines_and_of_coco(tmp_path: Path) -> None:
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"id": "bird", "caption": "a bird"}\n\n{"id": 7, "caption": " a fish "}\n{"caption": "a cat"}\n')
    assert read_captions(lines) == {"bird": "a bird", "7": "a fish", "4": "a cat"}
    coco = tmp_path / "captions_val2014.json"
    coco.write_text(json.dumps({"images": [], "annotations": [
        {"id": 37, "image_id": 5, "caption": "A bicycle."}, {"id": 49, "image_id": 5, "caption": "A room."}
    ]}))  # fmt: skip
    assert read_captions(coco) == {"37": "A bicycle.", "49": "A room."}
    for text, words in {
        '{"id": 1, "caption": "a"}\n{"id": "01", "caption": "b"}\n': ("line 2", "1 comes twice"),
        '{"id": 1}\n': ("line 1", "caption"),
        '{"id": 1, "caption": "  "}\n': ("line 1", "empty"),
        '{"id": [1], "caption": "a"}\n': ("line 1", "id"),
        "[1\n": ("line 1", "JSON"),
    }.items():
        lines.write_text(text)
        with pytest.raises(UserError) as refused:
            read_captions(lines)
        assert all(word in str(refused.value) for word in (str(lines), *words))


# --- votes


def test_names_are_one_in_all_spellings() -> None:
    assert annotator_name("  Ann\u0301a   B ") == annotator_name("AN\u0143A b") == "an\u0144a b"
    for name in ("", "   ", "x" * 65, "a\0b", "\ud800", "a\u202eb"):
        with pytest.raises(ValueError, match="printable"):
            annotator_name(name)


def test_a_question_is_asked_until_it_has_its_votes_and_once_of_each(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=4, annotators=2, checks=2)
    with Votes(out, study) as votes:
        for annotator in ("a", "b"):
            work = votes.work(annotator)
            assert (work.done, len(work.tasks)) == (0, 6)
            for task in work.tasks:
                assert task.questions == QUESTIONS
                votes.record(annotator, task.item, "realistic", task.item.check or "left")
                assert votes.work(annotator).tasks[0].questions == ("caption",)  # the pair begun is finished first
                votes.record(annotator, task.item, "caption", task.item.check or "right")
            assert votes.work(annotator).tasks == ()
            assert votes.work(annotator).done == 6
        assert {task.item.id for task in votes.work("c").tasks} == {item.id for item in study.checks}
        with pytest.raises(Refused, match="2 annotators"):
            votes.record("c", study.pairs[0], "caption", "left")
        with pytest.raises(Refused, match="before, with right"):
            votes.record("a", study.pairs[0], "caption", "left")
        assert len(votes.all()) == 2 * 6 * 2
    orders = [[task.item.id for task in Votes(tmp_path, study).work(name).tasks] for name in ("a", "b", "a")]
    assert orders[0] == orders[2] != orders[1]


def test_votes_of_who_fails_the_checks_are_asked_again_of_others(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, annotators=1, checks=4)
    assert study.wrong_allowed == 1  # of 8 answers
    with Votes(out, study) as votes:
        for item in study.pairs:
            for question in QUESTIONS:
                votes.record("careless", item, question, "left")
        wrong = {"left": "right", "right": "left"}
        votes.record("careless", study.checks[0], "realistic", wrong[study.checks[0].check])  # type: ignore[index, arg-type]
        assert {task.item for task in votes.work("other").tasks} == set(study.checks)
        votes.record("careless", study.checks[0], "caption", wrong[study.checks[0].check])  # type: ignore[index, arg-type]
        assert {task.item for task in votes.work("other").tasks} == set(study.items)
        votes.record("other", study.pairs[0], "caption", "right")
        with pytest.raises(Refused):
            votes.record("third", study.pairs[0], "caption", "right")


def test_votes_of_another_study_and_broken_files_are_refused(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=2)
    other_out, other = small_study(tmp_path / "other", pairs=2, seed=5)
    Votes(out, study).close()
    with pytest.raises(UserError, match="votes of another study"):
        Votes(out, other)
    (other_out / "votes.sqlite").write_bytes(b"no database at all, but long enough to look at" * 10)
    with pytest.raises(UserError, match=r"votes\.sqlite"):
        Votes(other_out, other)
    (out / "key.json").write_bytes((other_out / "key.json").read_bytes())
    with pytest.raises(UserError, match="key of another study"):
        load_key(out, study)
    whole = json.loads((out / "study.json").read_text())
    whole["items"][0]["left"] = "../key.json"
    (out / "study.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"items\.0\.left"):
        load_study(out)


# --- report


def cast(study: Study, out: Path, likes: dict[str, dict[str, list[int]]]) -> list[Vote]:
    """Votes of annotators by name: for each question, 1 for ``mine`` or 0 for each caption id in order."""
    key, votes = load_key(out, study), []
    for annotator, answers in likes.items():
        for question, choices in answers.items():
            for item in study.pairs:
                entry = key.items[item.id]
                wanted = "mine" if choices[int(entry.caption_id) - 1] else "theirs"
                side = "left" if entry.left == wanted else "right"
                votes.append(Vote(annotator, item.id, question, side, "2026-01-01T00:00:00"))  # type: ignore[arg-type]
    return votes


def test_majorities_ties_and_exclusions_by_hand(tmp_path: Path) -> None:
    out, study = small_study(tmp_path, pairs=3, annotators=3, checks=4)
    key = load_key(out, study)
    likes = {
        "a": {"realistic": [1, 1, 0], "caption": [1, 0, 0]},
        "b": {"realistic": [1, 0, 0], "caption": [1, 1, 0]},
        "c": {"realistic": [0, 1, 0]},
        "careless": {"realistic": [0, 0, 1], "caption": [0, 0, 1]},
    }
    votes = cast(study, out, likes)
    for item in study.checks:
        wrong = "left" if item.check == "right" else "right"
        votes.append(Vote("a", item.id, "caption", item.check, ""))  # type: ignore[arg-type]
        votes.append(Vote("careless", item.id, "caption", wrong, ""))  # type: ignore[arg-type]
    found = figures(count_votes(study, key, votes))

    realistic, caption = found["questions"]["realistic"], found["questions"]["caption"]
    assert {name: entry["pairs"] for name, entry in realistic["majority"].items()} == {"mine": 2, "theirs": 1}
    assert realistic["votes"] == {"mine": 4, "theirs": 5}
    assert realistic["ties"] == 0
    assert realistic["decided"] == 3
    assert realistic["pairs_by_votes"] == {"mine": [1, 0, 2, 0], "theirs": [0, 2, 0, 1]}
    assert realistic["agreement"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert realistic["majority"]["mine"]["share"]["value"] == pytest.approx(2 / 3)
    # Two annotators each: 2-0, 1-1, 0-2.
    assert {name: entry["pairs"] for name, entry in caption["majority"].items()} == {"mine": 1, "theirs": 1}
    assert (caption["ties"], caption["decided"], caption["with_all_votes"]) == (1, 2, 0)
    assert [(a["label"], a["checks_answered"], a["checks_wrong"], a["excluded"]) for a in found["annotators"]] == [
        ("A1", 4, 0, False), ("A2", 0, 0, False), ("A3", 0, 0, False), ("A4", 4, 4, True),
    ]  # fmt: skip
    warnings = "\n".join(found["warnings"])
    assert "caption: 3 of 3 pairs have fewer than the 3 votes" in warnings
    assert "realistic: 3" not in warnings
    assert "excluded by the attention checks: A4" in warnings
    assert "split evenly" in warnings


def test_the_report_is_a_page_a_plot_and_tables_without_names(tmp_path: Path, call: Call) -> None:
    out, study = small_study(tmp_path, pairs=5, annotators=3)
    assert "nobody has voted" in call("human-study", "report", out).mistake()
    key = load_key(out, study)
    with Votes(out, study) as votes:
        for annotator in ("Zebedee", "Florence", "Dougal"):
            for item in study.items:
                for question in QUESTIONS:
                    answer = item.check or ("left" if key.items[item.id].left == "mine" else "right")
                    votes.record(annotator_name(annotator), item, question, answer)
    done = call("human-study", "report", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((out / "report" / "report.json").read_text())
    for question in QUESTIONS:
        entry = found["questions"][question]
        assert entry["majority"]["mine"] == {"pairs": 5, "share": {"value": 1.0, "low": pytest.approx(0.5655, abs=1e-4),
                                                                    "high": 1.0}}  # fmt: skip
        assert entry["fleiss_kappa"] is None
        assert entry["agreement"] == 1.0
        assert entry["p_value"] == 2 / 2**5
    assert [annotator["checks_wrong"] for annotator in found["annotators"]] == [0, 0, 0]

    with (out / "report" / "pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert len(pairs) == 10
    assert {(p["votes mine"], p["votes theirs"], p["majority"]) for p in pairs} == {("3", "0", "mine")}
    with (out / "report" / "votes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(study.items) * 2
    assert Counter((row["system"], row["check"]) for row in rows) == {("mine", ""): 30, ("", "right"): 24}
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 10
    assert "<svg" in page
    assert "100.0" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    with Image.open(out / "report" / "votes.png") as plot:
        assert plot.width > 1000
    assert b"<svg" in (out / "report" / "votes.svg").read_bytes()[:400]
    written = b"".join(file.read_bytes() for file in (out / "report").iterdir()).lower()
    assert not any(name in written for name in (b"zebedee", b"florence", b"dougal"))
    before = {file.name: file.read_bytes() for file in (out / "report").iterdir()}
    done = call("human-study", "report", out)
    assert done.out == f"{out / 'report' / 'report.html'}\n"
    assert "100.0%" in done.err
    assert before == {file.name: file.read_bytes() for file in (out / "report").iterdir()}
