from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.pictures import noise, write_sample
from helpers.running import smallest_recipe, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.config.schema import DataSettings, Filters
from dalle_cli.data.language import LanguageDetector
from dalle_cli.data.open_source import open_source
from dalle_cli.data.scan import QUANTILES, FilterExample, FilterStatistics, examples, quantiles, scan


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Return a folder of 70 good samples and one sample of each defect."""
    data = tmp_path / "data"
    for i in range(70):
        write_sample(
            data, f"ok{i:02d}", noise(40 + i // 2, 40, i), f"a picture of noise number {i}", "noise, once more"
        )
    write_sample(data, "wide", noise(121, 40), "a wide picture of noise")
    write_sample(data, "flat", Image.new("RGB", (48, 48), "red"), "a picture of nothing")
    write_sample(data, "url", noise(48, 48), "https://example.org/12345")
    write_sample(data, "one-of-two", noise(48, 48), "https://example.org/12345", "a picture of noise and more")
    write_sample(data, "zz-broken", noise(48, 48), "a picture that is cut short")
    whole = (data / "zz-broken.png").read_bytes()
    (data / "zz-broken.png").write_bytes(whole[: len(whole) // 2])
    noise(48, 48).save(data / "zz-silent.jpg")
    (data / "zz-lone.txt").write_text("no picture")
    return data


def test_counts_are_those_of_the_samples(mixed: Path) -> None:
    source = open_source(mixed)
    found = scan(source, DataSettings(filters=Filters(min_words=4)), 40, workers=1)
    assert (found.samples, found.usable, found.captions) == (76, 74, 70 * 2 + 6)
    assert found.kept == 72  # without wide and url; flat is kept, since min_contrast is off
    assert found.picture_formats == {"PNG": 74, "JPEG": 1}
    assert found.measures["captions a picture"] == {"mean": pytest.approx(146 / 75)} | {
        f"{q}%": (2 if q >= 25 else 1) for q in QUANTILES
    }
    widths = [40 + i // 2 for i in range(70)] + [121, 48, 48, 48, 48]
    for q in QUANTILES:
        assert found.measures["width"][f"{q}%"] == np.percentile(widths, q, method="inverted_cdf")
    drops = {name: filter_.drops for name, filter_ in found.filters.items() if filter_.drops}
    # A sample is not dropped if one of its captions passes, as that of "one-of-two" does.
    assert drops == {"min_words": 1, "max_boilerplate": 1, "max_aspect_ratio": 1, "min_contrast": 1}
    assert found.filters["min_words"] == FilterStatistics(
        value=4, on=True, drops=1, examples=[FilterExample("url", "https://example.org/12345")]
    )
    assert found.filters["max_boilerplate"].on is False
    assert found.filters["min_contrast"].examples == [FilterExample("flat", "48 x 48")]
    broken = found.broken
    assert [sample.key for sample in broken.first] == ["zz-broken", "zz-silent"]
    assert broken.by_reason == {"damaged image": 1, "no caption": 1}
    assert broken.left_out_by_the_index == {"a caption without an image": 1}
    assert found.languages is None


def test_kept_samples_pass_the_filters(mixed: Path) -> None:
    source = open_source(mixed)
    everything = DataSettings(filters=Filters(min_words=4, min_contrast=4.0, min_side=40))
    nothing = DataSettings(filters=Filters(max_aspect_ratio=None))
    assert scan(source, everything, 40, workers=1).kept == 74 - 3  # wide, flat, url
    assert scan(source, nothing, 40, workers=1).kept == 74


def test_the_number_of_processes_changes_nothing(mixed: Path) -> None:
    source = open_source(mixed)
    assert scan(source, DataSettings(), 64, workers=3) == scan(source, DataSettings(), 64, workers=1)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_quantiles_of_counts(values: list[int]) -> None:
    from collections import Counter

    found = quantiles(Counter(map(float, values)))
    assert found.pop("mean") == pytest.approx(np.mean(values))
    assert found == {f"{q}%": np.percentile(values, q, method="inverted_cdf") for q in QUANTILES}


def test_examples_are_spread_and_readable(mixed: Path) -> None:
    shown = list(examples(open_source(mixed), 25, 10**8))
    assert 22 <= len(shown) <= 25
    assert all(image.mode == "RGB" and caption for image, caption in shown)
    assert len(list(examples(open_source(mixed), 1000, 10**8))) == 74


# --- the command


def test_stdout_has_only_the_json(call: Call, mixed: Path, tmp_path: Path) -> None:
    done = call("scan", mixed, "--json", "--out", tmp_path / "out", "--workers", 1)
    assert done.code == 0
    found = json.loads(done.out)
    assert found["samples"] == 76
    assert found["format"] == "folder"
    assert json.loads((tmp_path / "out" / "scan.json").read_text()) == found
    with Image.open(tmp_path / "out" / "examples.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 5 * 176
        assert sheet.height > 5 * 176


def test_tables_are_the_result_unless_a_folder_is(call: Call, mixed: Path, tmp_path: Path) -> None:
    settings = smallest_recipe(tmp_path, None)
    settings["data"]["filters"] = {"min_words": 4}
    arguments = ("scan", mixed, "--recipe", write_recipe(tmp_path, settings), "--workers", 1)
    done = call(*arguments)
    assert done.code == 0
    assert "min_words" not in done.err
    into = call(*arguments, "--out", tmp_path / "scan")
    assert (into.out, "min_words" in into.err) == (f"{tmp_path / 'scan'}\n", True)
    for text in (
        "76",
        "damaged image",
        "no caption",
        "a caption without an image",
        "max_boilerplate",
        "width / height",
        "share cropped away",
    ):
        assert text in done.out
    (line,) = [line for line in done.out.splitlines() if line.strip().startswith("min_words")]
    assert line.split()[:5] == ["min_words", "4", "on", "1", "1.3%"]


def test_a_recipe_excludes(call: Call, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("flat\nwide\n")
    settings = smallest_recipe(tmp_path, None)
    settings["data"]["exclude"] = str(tmp_path / "keys.txt")
    done = call("scan", mixed, "--recipe", write_recipe(tmp_path, settings), "--json")
    found = json.loads(done.out)
    assert found["broken"]["by_reason"]["excluded"] == 2
    assert found["usable"] == 72


def test_set_without_a_recipe_is_refused(call: Call, mixed: Path) -> None:
    assert "give one with --recipe" in call("scan", mixed, "--set", "data.max_pixels=5").mistake()


def test_a_missing_language_package_is_named(call: Call, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    assert 'pip install "dalle-toolchain[languages]"' in call("scan", mixed, "--languages").mistake()


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    for i, caption in enumerate(
        (
            "a dog that runs along the beach at night",
            "un chien qui court sur la plage la nuit",
            "犬が夜の海辺を走る",
            "12",
        )
    ):
        write_sample(tmp_path, str(i), noise(32, 32), caption)
    found = scan(open_source(tmp_path), DataSettings(), 32, workers=1, detector=LanguageDetector())
    assert found.languages == {"en": 1, "fr": 1, "ja": 1, "unsure": 1}
