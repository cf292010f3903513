"""The two-panel world: its pictures, and its oracle, which tells right bottoms from wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from helpers.running import ENVIRONMENT, smallest_recipe, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from dalle_cli.errors import UserError
from dalle_cli.shapes.drawing import BACKGROUND, OUTLINES
from dalle_cli.shapes.panels import (
    CHANGES,
    GROUNDS,
    RADII,
    Panel,
    Panels,
    apply_change,
    bottom_matches,
    make_panels,
    random_panels,
    read_panel,
    render_panels,
)
from dalle_cli.shapes.scene import COLOURS, HELD_OUT, LATTICE, SHAPES, SPLITS

Picture = NDArray[np.uint8]
COLOUR = LATTICE.colours


def panels_of(facts: dict[str, Any]) -> Panels:
    """Return the panels that a row's facts describe."""
    return Panels(Panel(**facts["top"]), facts["change"], Panel(**facts["bottom"]))


def worn(picture: Picture, seed: int) -> Picture:
    soft = ndimage.gaussian_filter(picture.astype(float), (0.8, 0.8, 0))
    return np.clip(np.rint(soft + np.random.default_rng(seed).normal(0, 8, soft.shape)), 0, 255).astype(np.uint8)


def test_changes_of_a_top() -> None:
    top = Panel("large", COLOUR[0], "star", "white", 0.5)
    assert apply_change(top, "same") == top
    assert apply_change(top, "smaller") == Panel("small", COLOUR[0], "star", "white", 0.5)
    assert apply_change(top, "on black") == Panel("large", COLOUR[0], "star", "black", 0.5)
    assert apply_change(top, f"in {COLOUR[1]}") == Panel("large", COLOUR[1], "star", "white", 0.5)
    with pytest.raises(ValueError, match="unknown change 'in plaid'"):
        apply_change(top, "in plaid")


def test_captions_do_not_describe_the_top() -> None:
    top = Panel("large", COLOUR[0], "star", "white", 0.5)
    captions = {Panels(top, change, apply_change(top, change)).caption for change in CHANGES}
    assert len(captions) == len(CHANGES)
    assert "the exact same shape on the top and on the bottom" in captions
    assert f"the exact same shape on the top in {COLOUR[1]} on the bottom" in captions
    assert not any(shape in text.split() for text in captions for shape in SHAPES)


@settings(max_examples=60)
@given(st.integers(0, 2**40), st.sampled_from(SPLITS), st.integers(0, 2**40))
def test_held_out_tops_stay_out_of_training(seed: int, split: str, index: int) -> None:
    pair = random_panels(seed, split, index)
    assert ((pair.top.colour, pair.top.shape) in HELD_OUT) == (split == "heldout")
    assert pair.bottom == apply_change(pair.top, pair.change)
    assert pair.change != f"in {pair.top.colour}"
    assert pair.change != "smaller" or (pair.top.size, pair.bottom.size) == ("large", "small")
    assert (
        panels_of(json.loads(json.dumps({"top": vars(pair.top), "change": pair.change, "bottom": vars(pair.bottom)})))
        == pair
    )


def test_the_world_is_varied() -> None:
    many = [random_panels(0, "train", index) for index in range(1000)]
    kinds = Counter("colour" if pair.change.startswith("in ") else pair.change for pair in many)
    assert sorted(kinds) == ["colour", "on black", "same", "smaller"]
    assert min(kinds.values()) > 200
    assert len({(t.top.colour, t.top.shape) for t in many}) == 6 * 6 - 4
    assert len(set(many)) > 400


def test_a_picture_has_two_halves() -> None:
    for index in range(40):
        pair = random_panels(1, SPLITS[index % 3], index)
        for size in (64, 128):
            picture = render_panels(pair, size)
            assert picture.shape == (size, size, 3)
            for half, panel in ((picture[: size // 2], pair.top), (picture[size // 2 :], pair.bottom)):
                edge = np.concatenate([half[0], half[-1], half[:, 0], half[:, -1]])
                assert (edge == GROUNDS[panel.ground]).all()
                # No pixel is of another colour, and the thing covers what its outline encloses.
                ground, ink = np.array(GROUNDS[panel.ground]), np.array(COLOURS[panel.colour])
                share = (half - ground.astype(float)) @ (ink - ground) / ((ink - ground) @ (ink - ground))
                assert np.abs(ground + share[..., None] * (ink - ground) - half).max() <= 1
                x, y = OUTLINES[panel.shape].T * RADII[panel.size] * size
                area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
                assert share.sum() == pytest.approx(area, rel=0.03)
        given_ = render_panels(pair, bottom=False)
        assert (given_[:32] == render_panels(pair)[:32]).all()
        assert (given_[32:] == BACKGROUND).all()
    for size in (24, 72):
        with pytest.raises(ValueError, match="multiple of 16"):
            render_panels(pair, size)


def test_a_same_bottom_is_its_top_token_for_token() -> None:
    pair = next(p for p in (random_panels(2, "train", index) for index in range(99)) if p.change == "same")
    picture = render_panels(pair)
    assert (picture[:32] == picture[32:]).all()


@pytest.mark.parametrize("damaged", [False, True])
def test_rendered_bottoms_are_read_right(damaged: bool) -> None:
    right = 0
    for index in range(200):
        pair = random_panels(3, SPLITS[index % 3], index)
        picture = worn(render_panels(pair), index) if damaged else render_panels(pair)
        right += bottom_matches(pair.top, pair.change, picture)
        ground, things = read_panel(picture[:32])
        assert ground == "white"
        assert [fact for fact, _ in things] == [pair.top.fact]
    assert right >= 198


def test_wrong_bottoms_are_not_taken_for_right_ones() -> None:
    for index in range(40):
        pair = random_panels(4, "heldout", index)
        for change in {*CHANGES, pair.change}:
            other = Panels(pair.top, change, apply_change(pair.top, change))
            assert bottom_matches(pair.top, pair.change, render_panels(other)) == (other.bottom == pair.bottom)
        for shape in LATTICE.shapes:
            bottom = Panel(pair.bottom.size, pair.bottom.colour, shape, pair.bottom.ground, pair.bottom.x)
            picture = render_panels(Panels(pair.top, pair.change, bottom))
            assert bottom_matches(pair.top, pair.change, picture) == (shape == pair.top.shape)
        assert not bottom_matches(pair.top, pair.change, render_panels(pair, bottom=False))


def test_any_half_is_read_and_other_arrays_are_refused() -> None:
    rng = np.random.default_rng(0)
    read_panel(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
    assert read_panel(np.zeros((32, 64, 3), np.uint8)) == ("black", [])
    with pytest.raises(ValueError, match="a panel is"):
        read_panel(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.slow
def test_the_study_prints_a_share_for_each_kind_of_top(tmp_path: Path) -> None:
    settings_ = smallest_recipe(tmp_path / "run", tmp_path / "run" / "shapes" / "train")
    settings_["data"] |= {"crop": False, "flip": False}
    recipe = write_recipe(tmp_path, settings_)
    script = Path(__file__).parents[2] / "scripts" / "studies" / "panels.py"
    command = [sys.executable, script, "--recipe", recipe, "--pictures", "40", "--tops", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert again.stdout == done.stdout
    figures = json.loads((tmp_path / "run" / "panels.json").read_text())
    assert set(figures) == {"unseen tops", "seen tops"}
    for found in figures.values():
        assert found["all"]["tops"] == 5 == sum(row["tops"] for name, row in found.items() if name != "all")
        assert all(0 <= row["right"] <= 1 for row in found.values())
    assert "unseen tops" in done.stdout
    assert (tmp_path / "run" / "panels.png").is_file()


def test_shards_hold_the_world(tmp_path: Path, call: Call) -> None:
    assert call("make-shapes", tmp_path / "a", "--panels", "--n", 5, "--test-n", 2, "--size", 32).code == 0
    with tarfile.open(tmp_path / "a" / "heldout" / "panels-00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert files["00000001.txt"].decode() == random_panels(0, "heldout", 1).caption
    assert panels_of(json.loads(files["00000001.json"])) == random_panels(0, "heldout", 1)
    refused = call("make-shapes", tmp_path / "a", "--n", 5, "--test-n", 2, "--size", 32).mistake()
    assert "holds another shapes world" in refused
    assert "'panels'" in refused
    with pytest.raises(UserError, match="multiple of 16"):
        make_panels(tmp_path / "b", 1, 1, 0, size=40)
