from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.generated_pictures import noise, system, write_folder, write_lines
from helpers.scorers import CLASSES, ColourScorer
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.fid.comparison import Settings, best_of_subsets, compare_systems
from dalle_cli.fid.features import Features, clip_features
from dalle_cli.fid.figures import Curves
from dalle_cli.fid.metrics import frechet_distance, resampled
from dalle_cli.fid.pictures import FilePictures, PictureSubset, named_by, open_pictures
from dalle_cli.fid.systems import open_system
from dalle_cli.shapes.drawing import render
from dalle_cli.shapes.scene import random_scene
from dalle_cli.shapes.world import phrasings


@pytest.fixture(scope="module")
def features() -> Features:
    return clip_features(ColourScorer(), CLASSES)


def test_the_best_of_a_random_subset_has_the_ranks_of_the_closed_form() -> None:
    n, sizes, captions, repeats = 6, [1, 2, 4, 6], 200, 40
    counts = [Counter[int]() for _ in sizes]
    for repeat in range(repeats):
        chosen = best_of_subsets([n] * captions, sizes, seed=1, repeat=repeat)
        assert (np.diff(chosen, axis=1) <= 0).all(), "a larger subset holds the smaller one"
        for place, counter in enumerate(counts):
            counter.update(chosen[:, place].tolist())
    total = captions * repeats
    for size, counter in zip(sizes, counts, strict=True):
        for rank in range(n):
            chance = math.comb(n - 1 - rank, size - 1) / math.comb(n, size)
            subsets = list(itertools.combinations(range(n), size))
            assert chance == pytest.approx(sum(min(s) == rank for s in subsets) / len(subsets))
            assert abs(counter[rank] - total * chance) <= 5 * math.sqrt(total * chance * (1 - chance)) + 1e-9
    again = best_of_subsets([n] * captions, sizes, seed=1, repeat=0)
    np.testing.assert_array_equal(again, best_of_subsets([n] * captions, sizes, seed=1, repeat=0))
    assert (again != best_of_subsets([n] * captions, sizes, seed=2, repeat=0)).any()
    with pytest.raises(ValueError, match="subsets of"):
        best_of_subsets([3, 2], [3], 0, 0)


def test_pool_curve_and_blur_are_the_figures_of_those_pictures(features: Features, tmp_path: Path) -> None:
    prompts = [f"caption {i}" for i in range(6)]
    ours = system("ours", write_lines(tmp_path / "ours", prompts, 4))
    real = open_pictures(str(write_folder(tmp_path / "real", 9)), 8)
    settings = Settings([0, 2], [1, 2, 4], repeats=3, bootstrap=4, seed=5)
    (figures,), _ = compare_systems([ours], real, features, settings, tmp_path / "cache")

    def measured(rows: Sequence[int]) -> Any:
        paths = [ours.pictures.paths[row] for row in rows]  # type: ignore[attr-defined]
        return features.extract(FilePictures(paths, 8)).vectors

    reference = features.extract(real).vectors
    best = [4 * caption for caption in range(6)]  # samples lie best first
    assert ours.pictures.paths[0].name == "0-3.png"  # type: ignore[attr-defined]
    assert figures.fid == pytest.approx(frechet_distance(measured(best), reference), rel=1e-6)
    assert figures.n_generated == 6
    sets = resampled(6, None, 4, 5)
    fids = [frechet_distance(measured(best)[rows], reference) for rows in sets]
    assert figures.fid_error == pytest.approx(np.std(fids, ddof=1), rel=1e-5)
    logits = features.extract(PictureSubset(ours.pictures, best)).logits
    assert logits is not None
    p = logits.double().softmax(dim=1)
    assert figures.score == pytest.approx(float((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()))
    assert [(point.size, point.repeats) for point in figures.pool] == [(1, 3), (2, 3), (4, 1)]
    for place, point in enumerate(figures.pool):
        fids = []
        for repeat in range(point.repeats):
            ranks = best_of_subsets([4] * 6, [1, 2, 4], 5, repeat)[:, place]
            fids.append(frechet_distance(measured(4 * np.arange(6) + ranks), reference))
        assert point.fid == pytest.approx(np.mean(fids), rel=1e-6)
        expected = np.std(fids, ddof=1) if len(fids) > 1 else None
        assert point.fid_error == (expected if expected is None else pytest.approx(expected, rel=1e-5))
    assert figures.pool[2].fid == pytest.approx(figures.fid, rel=1e-6)
    assert [point.radius for point in figures.blur] == [0, 2]
    assert figures.blur[0].fid == figures.fid != figures.blur[1].fid
    assert figures.accuracy == {}  # these are no captions of the shapes world


def test_accuracy_of_the_shapes_world_against_the_pool(features: Features, tmp_path: Path) -> None:
    lines = []
    for i in range(4):
        caption = phrasings(random_scene(0, "seen", i))[0]
        for rank, drawn in enumerate((i, i + 20, i + 40), start=1):  # only the best is right
            file = tmp_path / f"{i}-{rank}.png"
            Image.fromarray(render(random_scene(0, "seen", drawn))).save(file)
            lines.append({"prompt": caption, "png": str(file), "index": rank - 1, "score": 1 / rank, "rank": rank})
    manifest = tmp_path / "shapes.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = open_system("ours", str(manifest), 16, None, None, 0)
    real = open_pictures(str(tmp_path), 16)
    (found,), _ = compare_systems([ours], real, features, Settings((0,), [1, 3], 2), tmp_path / "cache")
    shares = found.accuracy["seen pairs"].by_pool_size
    assert shares[3].value == 1
    assert shares[1].value == pytest.approx(1 / 3, abs=0.01)


def test_figures_without_some_reference_pictures(features: Features, tmp_path: Path) -> None:
    """They are those against a folder that never had these pictures; the others stay."""
    ours = system("ours", write_lines(tmp_path / "ours", ["a", "b", "c"], 2))
    whole = open_pictures(str(write_folder(tmp_path / "real", 9)), 8)
    settings, cache = Settings([0, 1], [1, 2], repeats=2, bootstrap=3), tmp_path / "cache"
    left_out = named_by(whole, {"003", "005.png", "elsewhere/006"}, tmp_path / "real")
    assert np.flatnonzero(left_out).tolist() == [3, 5]
    assert np.flatnonzero(named_by(whole, {"real/004", "elsewhere/006"}, tmp_path / "real")).tolist() == [4]
    (before,), _ = compare_systems([ours], whole, features, settings, cache)
    (both,), _ = compare_systems([ours], whole, features, settings, cache, left_out)
    for name in ("003", "005"):
        (tmp_path / "real" / f"{name}.png").unlink()
    (fewer,), _ = compare_systems([ours], open_pictures(str(tmp_path / "real"), 8), features, settings, cache)
    assert before.without is None
    assert replace(both, without=None) == before
    assert both.without == Curves(**{each.name: getattr(fewer, each.name) for each in fields(Curves)})
    assert both.without.fid != before.fid
    with pytest.raises(UserError, match="--without: leaves 1 of 9 reference pictures"):
        compare_systems([ours], whole, features, settings, cache, np.arange(9) > 0)


def test_mismatched_counts_captions_and_sizes_are_told(features: Features, tmp_path: Path) -> None:
    one = system("one", write_lines(tmp_path / "one", ["a", "b", "c"], 2, scores=False))
    two = system("two", write_lines(tmp_path / "two", ["b", "c", "d"], 1, scores=False))
    real = open_pictures(str(write_folder(tmp_path / "real", 10)), 8)
    cache = tmp_path / "cache"
    _, warnings = compare_systems([one, two], real, features, Settings(), cache)
    assert any("2 in common, 1 only of one (such as 'a'), 1 only of two (such as 'd')" in w for w in warnings)
    assert any("different counts of pictures (one 6, two 3)" in w for w in warnings)
    large = open_system("one", one.spec, 16, None, None, 0)
    _, warnings = compare_systems([large], open_pictures(str(tmp_path / "real"), 16), features, Settings(), cache)
    assert any("one: 6 of 6 pictures are smaller than 16 pixels (the smallest 8)" in w for w in warnings)
    other = system("other", write_lines(tmp_path / "other", ["x", "y"], 1, scores=False))
    with pytest.raises(UserError, match="systems one and other have no caption in common"):
        compare_systems([one, other], real, features, Settings(), cache)


def test_ten_reference_pictures_for_2048_dimensions_are_warned_of(tmp_path: Path) -> None:
    class Wide(ColourScorer):
        name = identity = "wide"

        def image_features(self, images: Any) -> Any:
            return super().image_features(images).repeat(1, 683)[:, :2048]

    ours = system("ours", write_folder(tmp_path / "ours", 12))
    real = open_pictures(str(write_folder(tmp_path / "real", 10, 50)), 8)
    (found,), _ = compare_systems([ours], real, clip_features(Wide()), Settings(), tmp_path / "cache")
    (warning,) = [w for w in found.warnings if "singular" in w]
    assert warning.startswith("12 generated and 10 reference pictures for 2048 feature dimensions")


def test_what_cannot_be_measured_is_refused(features: Features, tmp_path: Path) -> None:
    real = open_pictures(str(write_folder(tmp_path / "real", 6)), 8)

    def refusal(manifest: Path, settings: Settings = Settings()) -> str:  # noqa: B008
        with pytest.raises(UserError) as caught:
            compare_systems([system("ours", manifest)], real, features, settings, tmp_path / "cache")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    manifest = write_lines(tmp_path / "ours", ["a", "b", "c"], 4)
    text = manifest.read_text()
    assert "system ours: 3 captions have fewer than 8 samples, such as 'a' with 4" in refusal(
        manifest, Settings((0,), [8])
    )
    manifest.write_text("".join(line for line in text.splitlines(keepends=True) if '"rank": 1,' in line))
    assert "holds only the best samples of 'a'" in refusal(manifest, Settings((0,), [1]))
    manifest.write_text(text)
    odd = tmp_path / "ours" / "1-2.png"
    noise(1, side=9).save(odd)
    assert f"system ours: {odd} is 9 x 9 pixels where the samples before are 8 x 8" in refusal(manifest)
    odd.unlink()
    assert f"system ours: {odd}: the sample's picture is missing, and so are 0 others" in refusal(manifest)
    # The same if reranking would not have looked at the picture.
    assert "picture is missing" in refusal(manifest, Settings((0,), [4]))
    odd.write_bytes(b"no picture")
    assert "1-2.png: no image" in refusal(manifest)
    manifest.write_text(text.splitlines()[0])
    assert "system ours: 1 given; a distribution needs two or more" in refusal(manifest)
    manifest.write_text("")
    assert "holds no sample" in refusal(manifest)
    unscored = write_lines(tmp_path / "unscored", ["a", "b"], 2, scores=False)
    assert "no system has scores to rerank by" in refusal(unscored, Settings((0,), [1]))
    # The pictures that a limit chose are looked at before they are measured, too.
    limited = system("ours", write_lines(tmp_path / "many", ["a", "b", "c"], 2, scores=False), limit=2)
    for row in (1, 3):
        Path(limited.pictures.name(row)).unlink()
    with pytest.raises(UserError, match="picture is missing, and so are 1 others"):
        compare_systems([limited], real, features, Settings(), tmp_path / "cache")
