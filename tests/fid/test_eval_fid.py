"""``dalle eval-fid`` whole: systems, captions, pools, presets, the cache, what it writes and what it refuses."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from helpers.running import Chain
from helpers.scorers import ColourScorer
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.fid import features as feature_cache
from dalle_cli.fid.comparison import Settings, compare_systems
from dalle_cli.fid.features import Features, cached_features, clip_features
from dalle_cli.fid.metrics import frechet_distance
from dalle_cli.fid.page import choose_grid, true_pictures_of, write_evaluation
from dalle_cli.fid.pictures import FilePictures, open_pictures, survey
from dalle_cli.fid.pools import best_of_subsets, parse_pool_sizes, parse_radii
from dalle_cli.fid.presets import open_preset
from dalle_cli.fid.systems import System, open_system
from dalle_cli.shapes.world import phrasings, random_scene, render

Line = dict[str, Any]
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def features() -> Features:
    return clip_features(ColourScorer(), CLASSES)


def noise(seed: int, side: int = 8) -> Image.Image:
    rng = np.random.default_rng(seed)
    shade = rng.integers(0, 200, 3)
    return Image.fromarray((rng.integers(0, 56, (side, side, 3)) + shade).astype(np.uint8))


def write_folder(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        noise(first + i).save(folder / f"{i:03d}.png")
    return folder


def write_lines(folder: Path, prompts: Sequence[str], n: int, *, scores: bool = True, first: int = 1000) -> Path:
    """A manifest of ``n`` samples a prompt, best last, in a folder of its own."""
    folder.mkdir(parents=True)
    lines = []
    for p, prompt in enumerate(prompts):
        for i in range(n):
            file = folder / f"{p}-{i}.png"
            noise(first + p * n + i).save(file)
            line: Line = {"prompt": prompt, "index": i, "png": str(file)}
            lines.append(line | ({"score": i / n, "rank": n - i, "scorer": "s"} if scores else {}))
    manifest = folder / "lines.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def system(name: str, spec: Path, captions: dict[str, str] | None = None, limit: int | None = None) -> System:
    return open_system(name, str(spec), 8, captions, limit, 0)


# Pools


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


def test_lists_of_sizes_and_radii() -> None:
    assert parse_pool_sizes("1,2,4,...,512") == [2**i for i in range(10)]
    assert parse_pool_sizes("8, 1,3,...,32") == [1, 3, 6, 8, 12, 24, 32]
    for text in ("", "0", "1,-2", "1,two", "...,8", "1,...", "1,,2"):
        with pytest.raises(UserError, match="is no list of pool sizes"):
            parse_pool_sizes(text)
    assert parse_radii("0,1,2.5") == [0, 1, 2.5]
    for text in ("", "-1", "x", "nan", "inf"):
        with pytest.raises(UserError, match="is no list of radii"):
            parse_radii(text)


def test_pool_curve_and_blur_are_the_figures_of_those_pictures(features: Features, tmp_path: Path) -> None:
    prompts = [f"caption {i}" for i in range(6)]
    ours = system("ours", write_lines(tmp_path / "ours", prompts, 4))
    real = open_pictures(str(write_folder(tmp_path / "real", 9)), 8)
    settings = Settings([0, 2], [1, 2, 4], repeats=3, bootstrap=4, seed=5)
    found = compare_systems([ours], real, features, settings, tmp_path / "cache")
    (figures,) = found["systems"]

    def measured(rows: Sequence[int]) -> Any:
        paths = [ours.pictures.paths[row] for row in rows]  # type: ignore[attr-defined]
        return features.extract(FilePictures(paths, 8)).vectors

    reference = features.extract(real).vectors
    best = [4 * caption for caption in range(6)]  # samples lie best first
    assert ours.pictures.paths[0].name == "0-3.png"  # type: ignore[attr-defined]
    assert figures["fid"] == pytest.approx(frechet_distance(measured(best), reference), rel=1e-6)
    assert figures["n_generated"] == 6
    assert figures["fid_error"] > 0
    assert figures["clip_is"] > 1
    assert [(p["size"], p["repeats"]) for p in figures["pool"]] == [(1, 3), (2, 3), (4, 1)]
    for place, point in enumerate(figures["pool"]):
        fids = []
        for repeat in range(point["repeats"]):
            ranks = best_of_subsets([4] * 6, [1, 2, 4], 5, repeat)[:, place]
            fids.append(frechet_distance(measured(4 * np.arange(6) + ranks), reference))
        assert point["fid"] == pytest.approx(np.mean(fids), rel=1e-6)
        expected = np.std(fids, ddof=1) if len(fids) > 1 else None
        assert point["fid_error"] == (expected if expected is None else pytest.approx(expected, rel=1e-5))
    assert figures["pool"][2]["fid"] == pytest.approx(figures["fid"], rel=1e-6)
    assert [point["radius"] for point in figures["blur"]] == [0, 2]
    assert figures["blur"][0]["fid"] == figures["fid"] != figures["blur"][1]["fid"]
    assert "accuracy" not in figures  # these are no captions of the shapes world


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
    found = compare_systems([ours], real, features, Settings((0,), [1, 3], 2), tmp_path / "cache")["systems"][0]
    shares = found["accuracy"]["seen pairs"]["by_pool_size"]
    assert shares["3"]["value"] == 1
    assert shares["1"]["value"] == pytest.approx(1 / 3, abs=0.01)


# Systems


def test_captions_join_folders_by_id_and_lines_by_id_or_prompt(tmp_path: Path) -> None:
    captions = {"1": "a cat", "2": "a dog"}
    folder = write_folder(tmp_path / "gan", 4)  # 000 to 003
    gan = system("gan", folder, captions)
    assert gan.captions == ["a cat", "a dog"]
    assert [path.name for path in gan.pictures.paths] == ["001.png", "002.png"]  # type: ignore[attr-defined]
    by_prompt = system("p", write_lines(tmp_path / "p", ["a dog", "other", "a cat"], 2), captions)
    assert by_prompt.captions == ["a cat"] * 2 + ["a dog"] * 2
    assert len(by_prompt.pools) == 2
    twice = system("t", tmp_path / "p" / "lines.jsonl", {**captions, "7": "a cat"}, limit=2)
    assert len(twice.pools) == 2
    assert len(twice.pictures) == 4
    assert twice.groups.tolist() == [0, 0, 1, 1]
    manifest = write_lines(tmp_path / "i", ["A Cat!", "A Dog!"], 1, scores=False)
    lines = [json.loads(line) | {"id": f"0{i}"} for i, line in enumerate(manifest.read_text().splitlines(), start=1)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert system("i", manifest, captions).captions == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"system gan: .*has no picture of 1 of the 1 captions, the first .*9 \('x'\)"):
        system("gan", folder, {"9": "x"})
    with pytest.raises(UserError, match=r"system p: .*has no picture of 1 of the 2 captions"):
        system("p", tmp_path / "p" / "lines.jsonl", {"1": "a cat", "2": "a cow"})


def test_a_limit_keeps_whole_captions_by_the_seed(tmp_path: Path) -> None:
    manifest = write_lines(tmp_path / "ours", [f"c{i}" for i in range(7)], 3)
    some = system("ours", manifest, limit=4)
    assert len(some.pictures) == 12
    assert len(some.pools) == 4
    assert [pool.prompt for pool in some.pools] == list(dict.fromkeys(some.captions or []))
    assert some.captions == system("ours", manifest, limit=4).captions
    real = system("real", write_folder(tmp_path / "real", 9), limit=5)
    assert len(real.pictures) == 5


def test_mismatched_counts_captions_and_sizes_are_told(features: Features, tmp_path: Path) -> None:
    one = system("one", write_lines(tmp_path / "one", ["a", "b", "c"], 2, scores=False))
    two = system("two", write_lines(tmp_path / "two", ["b", "c", "d"], 1, scores=False))
    real = open_pictures(str(write_folder(tmp_path / "real", 10)), 8)
    cache = tmp_path / "cache"
    warnings = compare_systems([one, two], real, features, Settings(), cache)["warnings"]
    assert any("2 in common, 1 only of one (as 'a'), 1 only of two (as 'd')" in w for w in warnings)
    assert any("different counts of pictures (one 6, two 3)" in w for w in warnings)
    large = open_system("one", one.spec, 16, None, None, 0)
    warnings = compare_systems([large], open_pictures(str(tmp_path / "real"), 16), features, Settings(), cache)[
        "warnings"
    ]
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
    found = compare_systems([ours], real, clip_features(Wide()), Settings(), tmp_path / "cache")
    (warning,) = [w for w in found["systems"][0]["warnings"] if "singular" in w]
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
    assert "system ours: 3 captions have fewer than 8 samples, as 'a' with 4" in refusal(manifest, Settings((0,), [8]))
    manifest.write_text("".join(line for line in text.splitlines(keepends=True) if '"rank": 1,' in line))
    assert "holds only the best of 'a'" in refusal(manifest, Settings((0,), [1]))
    manifest.write_text(text)
    odd = tmp_path / "ours" / "1-2.png"
    noise(1, side=9).save(odd)
    assert f"system ours: {odd} is 9 x 9 pixels where the samples before are 8 x 8" in refusal(manifest)
    odd.unlink()
    assert f"system ours: {odd}: the sample's picture is missing, and so are 0 others" in refusal(manifest)
    # Also where reranking would not have looked at it.
    assert "picture is missing" in refusal(manifest, Settings((0,), [4]))
    odd.write_bytes(b"no picture")
    assert "1-2.png: no image" in refusal(manifest)
    manifest.write_text(text.splitlines()[0])
    assert "system ours: 1 given; a distribution needs two or more" in refusal(manifest)
    manifest.write_text("")
    assert "holds no sample" in refusal(manifest)
    unscored = write_lines(tmp_path / "unscored", ["a", "b"], 2, scores=False)
    assert "no system has scores to rerank by" in refusal(unscored, Settings((0,), [1]))
    # Of what a limit chose, too.
    limited = system("ours", write_lines(tmp_path / "many", ["a", "b", "c"], 2, scores=False), limit=2)
    for row in (1, 3):
        Path(limited.pictures.name(row)).unlink()
    with pytest.raises(UserError, match="picture is missing, and so are 1 others"):
        compare_systems([limited], real, features, Settings(), tmp_path / "cache")


# Cache


def test_features_are_kept_by_content(features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 4)
    real = open_pictures(str(write_folder(tmp_path / "real", 10)), 8)
    cache = tmp_path / "cache"
    first = cached_features(real, survey(real), features, cache)
    np.testing.assert_array_equal(first.vectors.numpy(), features.extract(real).vectors.numpy())
    assert len(list(cache.iterdir())) == 3
    # Elsewhere, under other names: what is kept is used. Another blur or size is another thing.
    (tmp_path / "real").rename(tmp_path / "moved")
    for file in sorted((tmp_path / "moved").iterdir()):
        file.rename(file.with_name(f"x{file.name}"))
    moved = open_pictures(str(tmp_path / "moved"), 8)
    found = survey(moved)
    with monkeypatch.context() as patched:
        patched.setattr(Features, "extract", None)
        again = cached_features(moved, found, features, cache)
    assert again.logits is not None
    assert first.logits is not None
    np.testing.assert_array_equal(again.logits.numpy(), first.logits.numpy())
    blurred = cached_features(moved, found, features, cache, blur=2)
    assert len(list(cache.iterdir())) == 6
    assert (blurred.vectors != first.vectors).any()
    other = clip_features(ColourScorer(), CLASSES[:2])
    assert cached_features(moved, found, other, cache).logits.shape[1] == 2  # type: ignore[union-attr]
    # A damaged file is measured again, and so is the chunk with a picture that has changed.
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    np.testing.assert_array_equal(cached_features(moved, found, features, cache).vectors, first.vectors)
    noise(77).save(tmp_path / "moved" / "x009.png")
    changed = cached_features(moved, survey(moved), features, cache)
    assert (changed.vectors != first.vectors).any(dim=1).tolist() == [False] * 9 + [True]


# Page


def test_the_page_has_figures_curves_and_pictures_side_by_side(features: Features, tmp_path: Path) -> None:
    prompts = ["1", "2", "5"]
    ours = system("ours <x>", write_lines(tmp_path / "ours", prompts, 2))
    gan = system("gan", write_folder(tmp_path / "gan", 6, 30))
    real = open_pictures(str(write_folder(tmp_path / "real", 9, 60)), 8)
    found = compare_systems([ours, gan], real, features, Settings([0, 1], [1, 2], 2, 3), tmp_path / "cache")
    figures = {"reference": "real", "size": 8, "seed": 0, "bootstrap": 3} | found
    grid = choose_grid([ours, gan], true_pictures_of(None, real), 2, seed=0)
    assert len(grid) == 2
    assert {row.caption for row in grid} < set(prompts)
    row = grid[0]
    best, generated, true = row.pictures
    place = prompts.index(row.caption)
    np.testing.assert_array_equal(best, np.asarray(noise(1000 + 2 * place + 1)))
    np.testing.assert_array_equal(generated, np.asarray(noise(30 + int(row.caption))))
    np.testing.assert_array_equal(true, np.asarray(noise(60 + int(row.caption))))
    page = write_evaluation(figures, grid, tmp_path / "out")
    text = page.read_text()
    assert text.count("<img ") == 4 + 6
    assert "http" not in text
    assert "ours &lt;x&gt;" in text
    assert "<x>" not in text
    assert "never with published ones" in text
    assert "Side by side" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {
        f"{name}.{kind}" for name in ("blur_fid", "blur_score", "pool_fid", "pool_score") for kind in ("png", "svg")
    }
    assert names == plots | {"figures.json", "figures.csv", "index.html"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "figures.csv").read_text())))
    ours_fid = [r for r in rows if (r["system"], r["metric"]) == ("ours <x>", "fid")]
    assert [(r["curve"], r["x"]) for r in ours_fid] == [
        ("none", ""), ("blur", "0"), ("blur", "1"), ("pool", "1"), ("pool", "2"),
    ]  # fmt: skip
    assert float(ours_fid[0]["value"]) == figures["systems"][0]["fid"]
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == json.loads(json.dumps(figures))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_evaluation(figures, grid, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


# Presets


def write_coco(root: Path, split: str = "val2014", images: int = 4) -> None:
    (root / "annotations").mkdir(parents=True)
    write_folder(root / split, images)
    whole = {
        "images": [{"id": 10 + i, "file_name": f"{i:03d}.png"} for i in range(images)],
        "annotations": [
            {"id": 100 + 2 * i + j, "image_id": 10 + i, "caption": f" caption {i} {j} "}
            for i in range(images)
            for j in range(2)
        ],
    }
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(whole))


def test_coco_draws_captions_by_the_seed_against_the_whole_set(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    preset = open_preset("coco", str(tmp_path / "coco"), 3, seed=1)
    assert len(preset.captions) == 3
    assert preset.warnings == []
    for identity, caption in preset.captions.items():
        i, j = divmod(int(identity) - 100, 2)
        assert caption == f"caption {i} {j}"
        assert preset.pictures[identity].name == f"{i:03d}.png"
    assert [path.name for path in preset.reference] == [f"{i:03d}.png" for i in range(4)]
    assert open_preset("coco", str(tmp_path / "coco"), 3, seed=1) == preset
    assert open_preset("coco", str(tmp_path / "coco"), 3, seed=2).captions != preset.captions
    file = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    everything = open_preset("coco", str(file), 30_000, seed=1)
    assert len(everything.captions) == 8
    assert "8 captions, all of which" in everything.warnings[0]
    (tmp_path / "coco" / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"unpack val2014\.zip"):
        open_preset("coco", str(tmp_path / "coco"), 3, seed=1)
    with pytest.raises(UserError, match=r"annotations/captions_val2014\.json is missing"):
        open_preset("coco", str(tmp_path), 3, seed=1)


def test_cub_draws_of_the_test_part_and_names_what_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    images = [f"00{c}.Bird/{n}.png" for c in (1, 2) for n in (1, 2)]
    for number, image in enumerate(images):
        (root / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(root / "images" / image)
    with pytest.raises(UserError, match=r"it lacks images\.txt, train_test_split\.txt"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    (root / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, start=1)))
    with pytest.raises(UserError, match="text_c10"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    for image in images:
        text = (root / "text_c10" / image).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"a bird {image}\nanother\n")
    with pytest.raises(UserError, match=r"train_test_split\.txt: is missing, and so is testclasses"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n4 1\n")
    preset = open_preset("cub", str(tmp_path), 4, seed=0)
    assert preset.captions["2-1"] == f"a bird {images[1]}"
    assert set(preset.captions) == {"2-1", "2-2", "3-1", "3-2"}
    assert preset.reference == [root / "images" / images[1], root / "images" / images[2]]
    (root / "testclasses.txt").write_text("002.Bird\n")
    assert open_preset("cub", str(tmp_path), 4, seed=0).reference == [root / "images" / i for i in images[2:]]


# The command


def test_the_command_as_it_always_was_and_with_everything(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", images=6)
    wanted = tmp_path / "captions.jsonl"
    preset = (tmp_path / "coco", "--preset", "coco", "--draw", 5)
    assert call("eval-fid", *preset, "--write-captions", wanted).out == f"{wanted}\n"
    prompts = [json.loads(line) for line in wanted.read_text().splitlines()]
    manifest = write_lines(tmp_path / "ours", [line["caption"] for line in prompts], 2)
    measure = ("--clip", by_hand.clip, "--size", 32, "--cache", tmp_path / "cache")
    plain = call("eval-fid", manifest, tmp_path / "coco" / "val2014", *measure, "--out", tmp_path / "fid.json")
    assert plain.code == 0, plain.err
    figures = json.loads(plain.out)
    assert figures == json.loads((tmp_path / "fid.json").read_text())
    assert figures["generated"] == str(manifest)
    assert figures["n_generated"] == 10
    assert figures["n_reference"] == 6
    assert {"fid", "kid_mean", "precision", "recall", "fid_error", "warnings"} <= figures.keys()
    gan = tmp_path / "gan"
    gan.mkdir()
    for line in prompts:
        noise(int(line["id"])).save(gan / f"{line['id']}.png")
    whole = call(
        "eval-fid", "--system", f"ours={manifest}", "--system", f"gan={gan}", *preset, *measure,
        "--blur", "0,1", "--pool", "1,2", "--repeats", 2, "--bootstrap", 2, "--page", tmp_path / "page",
    )  # fmt: skip
    assert whole.code == 0, whole.err
    found = json.loads(whole.out)
    assert [(s["name"], s["n_generated"], "pool" in s) for s in found["systems"]] == [
        ("ours", 5, True),
        ("gan", 5, False),
    ]
    assert found["protocol"].startswith("5 captions of COCO's val2014, drawn by seed 0")
    assert found == json.loads((tmp_path / "page" / "figures.json").read_text())
    assert (tmp_path / "page" / "index.html").read_text().count("<img ") >= 2 + 3 * 5
    for arguments, words in {
        (gan,): "give GENERATED and REFERENCE",
        ("--system", "gan", gan): "is not NAME=GENERATED",
        ("--system", f"a={gan}", gan, gan): "the only argument is REFERENCE",
        (gan, gan, "--preset", "coco", "--captions", wanted): "exclude each other",
        ("--system", f"a={gan}", "--system", f"a={gan}", gan): "is given twice",
        (gan, gan, "--write-captions", wanted): "give --preset",
    }.items():
        assert words in call("eval-fid", *arguments).mistake()
