from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.shapes.drawing import BACKGROUND, OUTLINES, Ground, coverage, random_ground, render
from dalle_cli.shapes.scene import (
    COLOURS,
    FREE,
    HELD_OUT,
    LATTICE,
    SHAPES,
    SIZES,
    SPLITS,
    Claim,
    Fact,
    Kind,
    Scene,
    random_scene,
    select_pairs,
)
from dalle_cli.shapes.world import make_shapes, parse_caption, phrasings, random_caption

rows = st.tuples(
    st.integers(0, 2**40), st.sampled_from(SPLITS), st.integers(0, 2**40), st.sampled_from([LATTICE, FREE])
)


@settings(max_examples=60)
@given(rows, st.integers(0, 2**32))
def test_captions_state_the_facts_of_the_scene(row: tuple[int, str, int, Kind], caption_seed: int) -> None:
    scene = random_scene(*row)
    for text in [*phrasings(scene), random_caption(scene, np.random.default_rng(caption_seed))]:
        assert parse_caption(text) == scene.claim
        assert text == text.lower()
        assert text == " ".join(text.split())


def test_parsing_by_hand() -> None:
    star, square = Fact("small", "red", "star"), Fact("large", "blue", "square")
    above = Claim((star, square), "above")
    assert parse_caption("a small red star above a large blue square") == above
    assert parse_caption("a large blue square is below a small red star") == above
    assert parse_caption("below a small red star is a large blue square") == above
    assert parse_caption("there is a large blue square above a small red star") == Claim((square, star), "above")
    turned = Claim((square, star), "left of")
    assert parse_caption("A  small red star\nto the right of a large blue square") == turned
    assert parse_caption("one small red star") == Claim((star,), None)
    for text in (
        "",
        "a red star",
        "a small red star above",
        "a small beige star",
        "a small red star on a large blue square",
        "a small red star above a large blue square, twice",
    ):
        with pytest.raises(ValueError, match="not a caption"):
            parse_caption(text)


def test_every_phrasing_of_a_pair_is_different_and_both_sides_occur() -> None:
    scene = next(s for s in (random_scene(0, "train", i) for i in range(99)) if s.relation == "left of")
    captions = phrasings(scene)
    assert len(set(captions)) == len(captions) == 20
    first = " ".join(scene.things[0].fact)
    assert {text.index(first) < len(text) / 2 for text in captions} == {True, False}


@settings(max_examples=60)
@given(rows)
def test_things_are_inside_apart_and_in_their_relation(row: tuple[int, str, int, Kind]) -> None:
    scene = random_scene(*row)
    for thing in scene.things:
        assert thing.radius == SIZES[thing.size]
        for centre in (thing.x, thing.y):
            assert thing.radius <= centre <= 1 - thing.radius
    if scene.relation is None:
        assert len(scene.things) == 1
        return
    a, b = scene.things
    assert (a.colour, a.shape) != (b.colour, b.shape)
    right, down = b.x - a.x, b.y - a.y
    along = {"above": down, "below": -down, "left of": right, "right of": -right}[scene.relation]
    across = right if scene.relation in ("above", "below") else down
    assert along > a.radius + b.radius + 0.0299
    assert abs(across) < along / 3


@settings(max_examples=60)
@given(rows)
def test_held_out_pairs_stay_out(row: tuple[int, str, int, Kind]) -> None:
    held_out = [(thing.colour, thing.shape) in HELD_OUT for thing in random_scene(*row).things]
    assert any(held_out) if row[1] == "heldout" else not any(held_out)


def test_held_out_pairs_are_spread() -> None:
    assert len({colour for colour, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == len(HELD_OUT)


@pytest.mark.parametrize("size", LATTICE.sizes)
def test_pieces_of_a_held_out_thing_are_met_in_training(size: str) -> None:
    def pieces(shape: str) -> set[bytes]:
        side = round(2 * SIZES[size] * 64)
        share = coverage(shape, side / 2, side / 2, side / 2, side)
        return {share[y : y + 8, x : x + 8].tobytes() for y in range(0, side, 8) for x in range(0, side, 8)} - {
            np.zeros((8, 8)).tobytes()
        }

    for colour, shape in select_pairs(LATTICE, held_out=True):
        others = [other for other in LATTICE.shapes if (colour, other) not in HELD_OUT]
        assert pieces(shape) <= set().union(*(pieces(other) for other in others)), (colour, shape)


def naive_coverage(shape: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    from matplotlib.path import Path as Outline

    points = OUTLINES[shape] * radius + np.array([x, y])
    grid = (np.arange(side * 4) + 0.5) / 4
    inside = Outline(points).contains_points(np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2))
    return inside.reshape(side, 4, side, 4).mean(axis=(1, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_that_of_another_librarys_outline(shape: str) -> None:
    for x, y, radius in ((9.3, 8.7, 6.1), (10.01, 9.02, 8.3), (3.3, 4.4, 7.7)):
        found = coverage(shape, x, y, radius, 20)
        assert np.abs(found - naive_coverage(shape, x, y, radius, 20)).max() <= 1 / 16


@pytest.mark.parametrize(("kind", "pairs"), [(LATTICE, 32), (FREE, 72)])
def test_the_world_is_varied_and_its_splits_are_different_streams(kind: Kind, pairs: int) -> None:
    many = [random_scene(0, "train", i, kind) for i in range(2000)]
    assert 0.77 < sum(s.relation is not None for s in many) / 2000 < 0.83
    assert len({(t.colour, t.shape) for s in many for t in s.things}) == pairs
    assert {t.size for s in many for t in s.things} == set(kind.sizes)
    assert min(Counter(s.relation for s in many).values()) > 300
    # The lattice is finite, so a few scenes occur twice, mostly those of a single thing.
    assert len(set(many) | {random_scene(0, "seen", i, kind) for i in range(2000)}) > 3600
    assert random_scene(0, "train", 1, kind) != random_scene(1, "train", 1, kind)


def test_free_things_lie_off_the_lattice_on_shaded_grounds() -> None:
    things = [thing for i in range(300) for thing in random_scene(0, "train", i, FREE).things]
    offsets = np.array([(thing.x * 8) % 1 for thing in things])
    assert np.histogram(offsets, bins=4, range=(0, 1))[0].min() > 0.15 * len(things)
    empty = Scene((), None)
    grounds = [render(empty, 32, random_ground(0, "train", i)).astype(float) for i in range(200)]
    assert {ground.shape for ground in grounds} == {(32, 32, 3)}
    middles = [ground[15:17, 15:17].mean() for ground in grounds]
    assert (np.array(middles) > 190).all()
    assert np.ptp(middles) > 45
    assert max(abs(ground[16, 31, 0] - ground[16, 0, 0]) for ground in grounds) > 10
    plane = Ground(200, right=10, down=-20).pixels(64)
    assert plane[0, 0, 0] == pytest.approx(200 - 5 * 63 / 64 + 10 * 63 / 64)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rendered_areas_and_colours_are_those_of_the_geometry(size: int) -> None:
    # Areas at radius 1 from closed formulas; a 5-pointed star of radii R, r has area 5 R r sin(36 degrees).
    unit = {
        "square": 4.0,
        "star": 5 * 0.42 * np.sin(np.pi / 5),
        "tee": 3.0,
        "ell": 3.0,
        "bar": 2.0,
        "post": 2.0,
    }
    for index in range(60):
        scene = random_scene(4, "heldout", index)
        picture = render(scene, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        paper = np.array(BACKGROUND)
        covered = (picture != paper).any(axis=2)
        area = sum(unit[t.shape] * (t.radius * size) ** 2 for t in scene.things)
        assert covered.sum() >= area
        for thing in scene.things:
            place = thing.y - 0.1 * thing.radius, thing.x - 0.1 * thing.radius
            if thing.shape == "bar":
                place = thing.y + 0.1 * thing.radius, thing.x
            row, column = (int(part * size) for part in place)
            assert tuple(picture[row, column]) == COLOURS[thing.colour]
        # Anti-aliased: summed coverage, measured on the channel that changes most, gives the exact area.
        if scene.relation is None:
            ink = np.array(COLOURS[scene.things[0].colour])
            channel = int(np.abs(ink - paper).argmax())
            soft = (picture[..., channel] - paper[channel].astype(float)) / (ink - paper)[channel]
            rough = scene.things[0].shape == "star"  # the others' edges lie between sample points
            assert soft.sum() == pytest.approx(area, rel=0.05 if rough else 1e-9)


def test_render_refuses_odd_sizes() -> None:
    for size in (24, 65):
        with pytest.raises(ValueError, match="multiple of 8"):
            render(random_scene(0, "train", 0), size)


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def ten_rows_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.shapes.writer.ROWS_PER_SHARD", 10)


@pytest.mark.usefixtures("ten_rows_per_shard")
def test_shards_hold_the_scenes_and_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    made = make_shapes(tmp_path / "a", n=25, test_n=7, seed=3, size=32)
    assert (made.written, made.existing) == (39, 0)
    make_shapes(tmp_path / "b", n=25, test_n=7, seed=3, size=32)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert sorted(digest(tmp_path / "a")) == [
        "heldout/shapes-00000.tar",
        "seen/shapes-00000.tar",
        "train/shapes-00000.tar",
        "train/shapes-00001.tar",
        "train/shapes-00002.tar",
        "world.json",
    ]
    with tarfile.open(tmp_path / "a/train/shapes-00002.tar") as tar:
        assert len(tar.getnames()) == 15
        assert all((m.mtime, m.uid, m.gid) == (0, 0, 0) for m in tar.getmembers())

        def member(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        scene = random_scene(3, "train", 24)
        assert (np.asarray(Image.open(io.BytesIO(member("00000024.png")))) == render(scene, 32)).all()
        assert parse_caption(member("00000024.txt").decode()) == scene.claim
        facts = json.loads(member("00000024.json"))
        assert facts["relation"] == scene.relation
        assert facts["things"][0]["colour"] == scene.things[0].colour
    world = json.loads((tmp_path / "a/world.json").read_text())
    assert world["seed"] == 3
    assert world["held_out"] == [["blue", "post"], ["green", "bar"], ["red", "ell"], ["yellow", "square"]]


@pytest.mark.usefixtures("ten_rows_per_shard")
def test_a_rows_bytes_do_not_depend_on_how_many_are_made(tmp_path: Path) -> None:
    make_shapes(tmp_path / "a", n=10, test_n=0, seed=3, size=32)
    make_shapes(tmp_path / "b", n=20, test_n=5, seed=3, size=32)
    name = "train/shapes-00000.tar"
    assert digest(tmp_path / "a")[name] == digest(tmp_path / "b")[name]


@pytest.mark.usefixtures("ten_rows_per_shard")
def test_a_killed_run_is_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_shapes(tmp_path, n=30, test_n=5, seed=1, size=32)
    whole = digest(tmp_path)
    lost = tmp_path / "train/shapes-00001.tar"
    half = lost.read_bytes()[:5000]
    lost.unlink()
    (tmp_path / "train/.shapes-00001.tar.partial").write_bytes(half)  # a killed run leaves this
    capfd.readouterr()
    made = make_shapes(tmp_path, 30, 5, 1, 32)
    assert (made.written, made.existing) == (10, 30)
    assert "30 of 40 pictures" in capfd.readouterr().err
    assert digest(tmp_path) == whole


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    make_shapes(tmp_path / "a", n=3, test_n=1, seed=1, size=32)
    with pytest.raises(UserError, match="seed is 1, not 2"):
        make_shapes(tmp_path / "a", n=3, test_n=1, seed=2, size=32)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="no shapes world"):
        make_shapes(tmp_path / "b", n=3, test_n=1, seed=1, size=32)
    (tmp_path / "b/world.json").write_text("[1")
    with pytest.raises(UserError, match="not a world's settings"):
        make_shapes(tmp_path / "b", n=3, test_n=1, seed=1, size=32)
    for n, seed, size, named in ((0, 1, 32, "n 0"), (3, -1, 32, "seed -1"), (3, 1, 60, "size 60")):
        with pytest.raises(UserError, match=named):
            make_shapes(tmp_path / "c", n=n, test_n=1, seed=seed, size=size)
    assert not (tmp_path / "c").exists()


def test_a_free_world_has_the_facts_of_its_pictures(tmp_path: Path) -> None:
    make_shapes(tmp_path, n=3, test_n=1, seed=3, size=32, kind=FREE)
    with tarfile.open(tmp_path / "train/free-shapes-00000.tar") as tar:
        members = {name: tar.extractfile(name) for name in tar.getnames()}
        png, facts = (members[f"00000002.{suffix}"] for suffix in ("png", "json"))
        assert png is not None
        assert facts is not None
        ground = Ground(**json.loads(facts.read())["ground"])
        assert ground == random_ground(3, "train", 2)
        drawn = render(random_scene(3, "train", 2, FREE), 32, ground)
        assert (np.asarray(Image.open(io.BytesIO(png.read()))) == drawn).all()
    assert len(json.loads((tmp_path / "world.json").read_text())["held_out"]) == 8
