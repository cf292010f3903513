from __future__ import annotations

import json
from collections import Counter
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
from dalle_cli.config.schema import DataSettings, Filters
from dalle_cli.data.exclude import SourceWithExclusions, read_keys
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
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures
from dalle_cli.data.source import BadSample
from dalle_cli.errors import UserError

OFF = Filters(max_aspect_ratio=None)


# --- Captions


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
def test_a_limit_itself_passes_and_beyond_it_not(name: str, limit: float, passes: str, refused: str) -> None:
    filters = OFF.model_copy(update={name: limit})
    assert filter_captions([passes], filters) == ([passes], None)
    assert filter_captions([refused], filters) == ([], f"filtered: {name}")


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
def test_descriptions_are_no_boilerplate(caption: str) -> None:
    assert list(failed_caption_filters(caption, OFF.model_copy(update={"max_boilerplate": 0.6}))) == []


def test_a_recipe_may_add_boilerplate() -> None:
    filters = OFF.model_copy(update={"max_boilerplate": 0.5})
    assert filter_captions(["ACME catalogue item"], filters)[1] is None
    more = filters.model_copy(update={"boilerplate": ["acme catalogue"]})
    assert filter_captions(["ACME catalogue item"], more) == ([], "filtered: max_boilerplate")


@pytest.mark.parametrize(
    "caption", ["a-" * 500_000, "photo " * 200_000, "a.b@" * 250_000, "1 " * 500_000, "\t" * 10**6]
)
def test_a_caption_of_a_megabyte_takes_no_minutes(caption: str) -> None:
    everything = with_typical_limits(Filters(), 256)
    assert "max_characters" in list(failed_caption_filters(caption, everything))


def test_of_several_captions_those_that_pass_are_kept_in_order() -> None:
    filters = OFF.model_copy(update={"min_words": 2, "max_words": 3})
    captions = ["dog", "a dog", "one two three four", "a red dog"]
    assert filter_captions(captions, filters) == (["a dog", "a red dog"], None)
    assert filter_captions(captions[2::-2], filters) == ([], "filtered: max_words")
    assert filter_captions([], filters) == ([], "no caption")


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_judged(captions: list[str]) -> None:
    assert filter_captions(captions, OFF)[0] == captions  # all filters off
    everything = with_typical_limits(Filters(), 256)
    kept, reason = filter_captions(captions, everything)
    assert kept == [caption for caption in captions if not list(failed_caption_filters(caption, everything))]
    assert (reason is None) == bool(kept)


# --- Pictures


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


# --- Recipe


def test_every_filter_of_the_recipe_is_implemented_and_none_else() -> None:
    assert {*CAPTION_MEASURES, *PICTURE_MEASURES, "boilerplate"} == set(Filters.model_fields)
    everything = with_typical_limits(Filters(), 64)
    assert all(getattr(everything, name) is not None for name in Filters.model_fields)
    assert with_typical_limits(Filters(min_words=7), 64).min_words == 7


def test_an_identity_holds_what_changes_its_part_only() -> None:
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
    ("filters", "told"),
    [
        ("{min_word: 3}", "data.filters.min_word: unknown key; did you mean 'min_words'?"),
        ("{max_aspect_ratio: 0.5}", "data.filters.max_aspect_ratio"),
        ("{boilerplate: ['(']}", "boilerplate '(' is no regular expression"),
        ("{max_upper_case: 2}", "data.filters.max_upper_case"),
    ],
)
def test_a_wrong_filter_is_named_with_its_line(tmp_path: Path, filters: str, told: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\ndata:\n  filters: {filters}\n")
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert told in str(error.value)
    assert f"{file}:3" in str(error.value)


def test_filters_survive_being_dumped(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: {filters: {min_words: 3, max_aspect_ratio: null, boilerplate: [acme]}}\n")
    recipe = load_recipe(file)
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert recipe.data.filters == Filters(min_words=3, max_aspect_ratio=None, boilerplate=["acme"])


# --- Exclusion


def test_excluded_samples_keep_their_places(tmp_path: Path) -> None:
    for key in "abcd":
        write_sample(tmp_path / "data", key, noise(40, 40), f"caption {key}")
    source = open_source(tmp_path / "data")
    lines, plain = tmp_path / "dup.jsonl", tmp_path / "dup.txt"
    lines.write_text('{"key": "b", "match": "a"}\n\n{"key": "d"}\n{"key": "elsewhere"}\n')
    plain.write_text("b\nd\n")
    for file in (lines, plain):
        less = SourceWithExclusions(source, file)
        assert [less.key(i) for i in range(len(less))] == list("abcd")
        assert less.count == 2
        assert less.captions(0) == ["caption a"]
        assert less.image_bytes(2) == source.image_bytes(2)
        for row in (1, 3):
            for read in (less.captions, less.image_bytes):
                with pytest.raises(BadSample, match=f"excluded: {file.name}"):
                    read(row)
        assert f"2 excluded by {file}" in less.describe()
    assert SourceWithExclusions(source, lines).name != SourceWithExclusions(source, plain).name
    assert read_keys(lines)[0] == {"b", "d", "elsewhere"}


def test_a_wrong_file_of_keys_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "data", "a", noise(40, 40), "caption")
    source = open_source(tmp_path / "data")
    for name, text, told in (
        ("other.txt", "x\ny\n", "none of its 2 keys is in"),
        ("bad.jsonl", '{"key": "a"}\n["a"]\n', "bad.jsonl:2: is not an object"),
        ("half.jsonl", '{"key": "a"}\n{"ke', "half.jsonl:2: is not an object"),
        ("number.jsonl", '{"key": 3}\n', "number.jsonl:1: is not an object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=told):
            SourceWithExclusions(source, tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        SourceWithExclusions(source, tmp_path / "missing.txt")
    (tmp_path / "empty.jsonl").write_text("")  # nothing was found: nothing is left out
    assert SourceWithExclusions(source, tmp_path / "empty.jsonl").count == 0


# --- Training and stores


def test_training_draws_replacements_evenly(tmp_path: Path) -> None:
    """150 filtered samples in a row, then 20 good ones: each of those is seen about as often as the others."""
    for i in range(170):
        write_sample(tmp_path, f"{i:03d}", Image.new("RGB", (100, 20) if i < 150 else (20, 20)), "x")
    pictures = TrainingPictures(
        open_source(tmp_path),
        np.arange(170),
        16,
        DataSettings(crop=False),
        seed=0,
        batch_size=170,
        flip=False,
        workers=0,
    )
    seen: Counter[int] = Counter()
    for _, rows, _ in pictures.batches(0, 4):
        seen.update(rows.tolist())
    assert min(seen) >= 150
    assert sum(seen.values()) == 680
    assert max(seen.values()) < 3 * min(seen.values())  # 34 on average
    again = [rows.tolist() for _, rows, _ in pictures.batches(3, 4)]
    assert again == [rows.tolist() for _, rows, _ in pictures.batches(3, 4)]


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
    # Another filter, or another exclusion, is another store.
    refused = call("tokenize-text", recipe, "--set", "data.filters.min_words=2").mistake()
    assert "text part was made with filters" in refused
    assert (
        "image part was made with filters"
        in call("encode-images", recipe, "--set", "data.filters.min_side=9").mistake()
    )
    assert "was made with source" in call("encode-images", recipe, "--set", "data.exclude=null").mistake()
