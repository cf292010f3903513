from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.pictures import noise, write_sample
from helpers.running import smallest_recipe, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.config.load import dump_recipe, load_recipe
from dalle_cli.config.schema import Filters
from dalle_cli.data.filters import (
    CAPTION_MEASURES,
    PICTURE_MEASURES,
    caption_identity,
    failed_caption_filters,
    filter_captions,
    picture_identity,
    picture_rejection,
    with_typical_limits,
)
from dalle_cli.data.language import shared_detector
from dalle_cli.errors import UserError

OFF = Filters(max_aspect_ratio=None)


# --- captions


@pytest.mark.parametrize(
    ("name", "limit", "passes", "refused"),
    [
        ("min_words", 3, "a red dog", "red  dog"),
        ("max_words", 3, "a red dog", "a red dog runs"),
        ("min_characters", 7, "red dog", "re dog"),
        ("max_characters", 7, "red dog", "red dogs"),
        ("max_word_run", 2, "very very big, very big", "big Big BIG house"),
        ("min_unique_words", 0.5, "dog Dog cat, cat", "dog dog cat dog cat"),
        ("max_upper_case", 0.5, "DOG dog 123 !", "DOGS dog"),
        ("min_ascii_letters", 0.75, "Sãos 2 !", "собака dog"),
        ("max_boilerplate", 0.5, "a red dog, May 2012 ...", "dog, May 2012"),
    ],
)
def test_a_limit_itself_passes_and_a_value_beyond_it_fails(name: str, limit: float, passes: str, refused: str) -> None:
    filters = OFF.model_copy(update={name: limit})
    assert filter_captions([passes], filters) == ([passes], None)
    assert filter_captions([refused], filters) == ([], f"filtered: {name}")


@pytest.mark.parametrize(
    ("language", "caption", "passes"),
    [
        ("en", "a small brown dog sleeps on the green grass beside the house", True),
        ("en", "ein kleiner brauner Hund schläft auf dem grünen Rasen neben dem Haus", False),
        ("de", "ein kleiner brauner Hund schläft auf dem grünen Rasen neben dem Haus", True),
        ("en", "un petit chien brun dort sur la pelouse verte à côté de la maison", False),
        ("en", "маленькая коричневая собака спит на зелёной траве", False),
    ],
)
def test_captions_in_another_language_are_left_out(language: str, caption: str, passes: bool) -> None:
    filters = OFF.model_copy(update={"language": language})
    assert filter_captions([caption], filters) == (([caption], None) if passes else ([], "filtered: language"))
    assert caption_identity(filters) == {"language": language}
    assert caption_identity(OFF) is None


def test_the_language_filter_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_detector.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r'pip install "dalle-toolchain\[languages\]"'):
        filter_captions(["a dog"], OFF.model_copy(update={"language": "en"}))


@pytest.mark.parametrize(
    "caption",
    [
        "Photographed on 12 March 2008",
        "photographed on 2008-03-12 at 12:33",
        "Photo taken on March 3rd, 2012",
        "taken 3/12/08",
        "IMG_1234.JPG",
        "DSC01234",
        "P1010101",
        "my-file_2.jpeg",
        "https://example.org/a?b=c",
        "www.example.org",
        "someone@example.org",
        "Click here to enlarge the image",
        "Royalty-free stock photo",
        "Stock vector © 2014",
        "image courtesy of Getty Images",
        "Untitled",
        "1024x768",
        "Profile photo",
        "Screenshot from 2014-02-01 10:22:33",
        "no alt text",
    ],
)
def test_boilerplate_is_refused(caption: str) -> None:
    assert list(failed_caption_filters(caption, OFF.model_copy(update={"max_boilerplate": 0.6}))) == ["max_boilerplate"]


@pytest.mark.parametrize(
    "caption",
    [
        "a dog may run on the beach",
        "a march through the city in 1964",
        "royalty free stock photo of a dog that runs along the beach",
        "a photo by the sea",
        "a picture of a woman who is taking a photo",
        "the plane was taken down",
        "two dogs at 12:30 in the park near the river",
        "a man in a t-shirt that says www",
        "May the 4th be with you",
        "犬が走る",
        "12",
        "!?",
        "🙂",
    ],
)
def test_descriptions_are_not_boilerplate(caption: str) -> None:
    assert list(failed_caption_filters(caption, OFF.model_copy(update={"max_boilerplate": 0.6}))) == []


def test_a_recipe_may_add_boilerplate() -> None:
    filters = OFF.model_copy(update={"max_boilerplate": 0.5})
    assert filter_captions(["ACME catalogue item"], filters)[1] is None
    more = filters.model_copy(update={"boilerplate": ["acme catalogue"]})
    assert filter_captions(["ACME catalogue item"], more) == ([], "filtered: max_boilerplate")


@pytest.mark.parametrize(
    "caption", ["a-" * 500_000, "photo " * 200_000, "a.b@" * 250_000, "1 " * 500_000, "\t" * 10**6]
)
def test_a_caption_of_a_megabyte_is_judged_in_bounded_time(caption: str) -> None:
    everything = with_typical_limits(Filters(), 256)
    assert "max_characters" in list(failed_caption_filters(caption, everything))


def test_captions_that_pass_keep_their_order() -> None:
    filters = OFF.model_copy(update={"min_words": 2, "max_words": 3})
    captions = ["dog", "a dog", "one two three four", "a red dog"]
    assert filter_captions(captions, filters) == (["a dog", "a red dog"], None)
    assert filter_captions(captions[2::-2], filters) == ([], "filtered: max_words")
    assert filter_captions([], filters) == ([], "no caption")


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=200)
def test_any_text_can_be_judged(captions: list[str]) -> None:
    assert filter_captions(captions, OFF)[0] == captions  # all filters off
    everything = with_typical_limits(Filters(), 256)
    passed, reason = filter_captions(captions, everything)
    assert passed == [caption for caption in captions if not list(failed_caption_filters(caption, everything))]
    assert (reason is None) == bool(passed)


# --- pictures


@pytest.mark.parametrize("turned", [False, True])
def test_aspect_ratio_is_filtered_by_default_as_in_the_paper(turned: bool) -> None:
    for width, height, refusal in ((64, 64, None), (200, 100, None), (201, 100, "filtered: max_aspect_ratio")):
        size = (height, width) if turned else (width, height)
        assert picture_rejection(Image.new("RGB", size), Filters()) == refusal
        assert picture_rejection(Image.new("RGB", size), OFF) is None


def test_small_pictures() -> None:
    filters = OFF.model_copy(update={"min_side": 50})
    assert picture_rejection(noise(50, 80), filters) is None
    assert picture_rejection(noise(80, 49), filters) == "filtered: min_side"


def test_pictures_of_one_colour() -> None:
    filters = OFF.model_copy(update={"min_contrast": 4.0})
    rng = np.random.default_rng(0)
    grain = Image.fromarray(rng.normal(20, 10, (640, 640, 3)).clip(0, 255).astype(np.uint8))
    small_thing = Image.new("RGB", (640, 640), "white")
    small_thing.paste((0, 0, 0), (300, 300, 380, 380))
    assert picture_rejection(Image.new("RGB", (640, 640), "navy"), filters) == "filtered: min_contrast"
    assert picture_rejection(grain, filters) == "filtered: min_contrast"  # a dark frame's sensor noise
    assert picture_rejection(small_thing, filters) is None
    assert picture_rejection(noise(640, 640), filters) is None


# --- the recipe


def test_exactly_the_filters_of_the_recipe_are_implemented() -> None:
    assert {*CAPTION_MEASURES, *PICTURE_MEASURES, "boilerplate"} == set(Filters.model_fields)
    everything = with_typical_limits(Filters(), 64)
    assert all(getattr(everything, name) is not None for name in Filters.model_fields if name != "language")
    assert with_typical_limits(Filters(min_words=7), 64).min_words == 7


def test_an_identity_holds_only_the_filters_of_its_part() -> None:
    assert caption_identity(Filters()) is None
    assert picture_identity(OFF) is None
    assert picture_identity(Filters(min_words=3)) == {"max_aspect_ratio": 2.0}
    assert caption_identity(Filters(min_words=3, min_side=8)) == {"min_words": 3}
    assert caption_identity(Filters(boilerplate=["x"])) is None
    assert caption_identity(Filters(max_boilerplate=0.5, boilerplate=["x"])) == {
        "max_boilerplate": 0.5,
        "boilerplate": ["x"],
    }


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("{min_word: 3}", "data.filters.min_word: unknown key; did you mean 'min_words'?"),
        ("{max_aspect_ratio: 0.5}", "data.filters.max_aspect_ratio"),
        ("{boilerplate: ['(']}", "boilerplate '(' is no regular expression"),
        ("{max_upper_case: 2}", "data.filters.max_upper_case"),
    ],
)
def test_a_wrong_filter_is_named_with_its_line(tmp_path: Path, filters: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\ndata:\n  filters: {filters}\n")
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert message in str(error.value)
    assert f"{file}:3" in str(error.value)


def test_filters_survive_being_dumped(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: {filters: {min_words: 3, max_aspect_ratio: null, boilerplate: [acme]}}\n")
    recipe = load_recipe(file)
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert recipe.data.filters == Filters(min_words=3, max_aspect_ratio=None, boilerplate=["acme"])


def test_stores_and_report_count_by_filter(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(12):
        write_sample(data, f"ok{i:02d}", noise(40, 40, i), f"a picture of noise number {i}", f"noise {i} again here")
    write_sample(data, "wide", noise(100, 40), "a wide picture of noise")
    write_sample(data, "tall", noise(40, 100), "a tall picture of noise")
    write_sample(data, "flat", Image.new("RGB", (40, 40), "red"), "a picture of nothing")
    write_sample(data, "short", noise(40, 40, 99), "noise", "noise!")
    write_sample(data, "dup", noise(40, 40, 3), "a picture seen before, noise")
    (tmp_path / "dup.txt").write_text("dup\n")
    settings = smallest_recipe(tmp_path / "run", data)
    settings["data"] |= {"exclude": str(tmp_path / "dup.txt"), "filters": {"min_words": 3, "min_contrast": 4.0}}
    recipe = write_recipe(tmp_path, settings)
    for stage in ("train-tokenizer", "train-dvae", "tokenize-text", "encode-images"):
        done = call(stage, recipe)
        assert done.code == 0, done.err
    text = {"excluded: dup.txt": 1, "filtered: min_words": 1}
    image = {"excluded: dup.txt": 1, "filtered: max_aspect_ratio": 2, "filtered: min_contrast": 1}
    shown = json.loads(call("show", tmp_path / "run" / "tokens.zarr", "--json").out)
    assert shown["skipped"] == {"text": text, "image": image}
    assert shown["usable_rows"] == 12
    assert call("report", recipe).code == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"].pop("source").startswith(f"{data} without dup.txt")
    assert report["data"] == {"rows": 17, "usable": 12, "skipped": {"text": text, "image": image}}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "17 samples; 12 of them hold a caption and a picture" in page
    assert '<td>image</td><td>filtered: max_aspect_ratio</td><td class="number">2</td>' in page
    # A store is not continued with another filter or another exclusion.
    refused = call("tokenize-text", recipe, "--set", "data.filters.min_words=2").mistake()
    assert "text part was made with filters" in refused
    assert (
        "image part was made with filters"
        in call("encode-images", recipe, "--set", "data.filters.min_side=9").mistake()
    )
    assert "holds other files" in call("encode-images", recipe, "--set", "data.exclude=null").mistake()
