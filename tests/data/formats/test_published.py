"""Published data sets, as small copies of their archives."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers.sources import write_files

from dalle_cli.data.open_source import FORMATS, open_source
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError


def contents(source: Source) -> dict[str, tuple[bytes | str, list[str] | str]]:
    """Return what a pickled copy reads: (image bytes, captions) by key, or the reason where one cannot be read."""
    source = pickle.loads(pickle.dumps(source))
    found = {}
    for i in range(len(source)):
        row: list[Any] = []
        for read in (source.image_bytes, source.captions):
            try:
                row.append(read(i))
            except BadSample as error:
                row.append(str(error))
        found[source.key(i)] = (row[0], row[1])
    assert list(found) == sorted(found)
    assert len(found) == len(source)
    return found


# --- COCO: annotations_trainval2017.zip and train2017.zip


def coco(images: dict[int, str], captions: list[tuple[int, int, str]]) -> str:
    """Return a captions file as the authors write it, from (annotation's id, image's id, caption)."""
    info = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
    entries = [
        {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/{name}", "height": 480, "id": i}
        for i, name in images.items()
    ]
    annotations = [{"image_id": image, "id": i, "caption": caption} for i, image, caption in captions]
    return json.dumps({"info": info, "licenses": [], "images": entries, "annotations": annotations})


COCO_IMAGES = {391895: "000000391895.jpg", 9: "000000000009.jpg", 522418: "000000522418.jpg"}
COCO_CAPTIONS = [
    (770337, 391895, "A man with a red helmet on a small moped on a dirt road. "),
    (48, 9, "Closeup of bins of food that include broccoli and bread."),
    (37, 9, "A meal is presented in brightly colored plastic trays.\n"),
    (771687, 391895, "Man riding a motor bike on a dirt road on the countryside."),
    (40, 9, "there are containers filled with different kinds of foods"),
]
COCO_READ = {
    "000000000009": (b"bins", [COCO_CAPTIONS[2][2].strip(), COCO_CAPTIONS[4][2], COCO_CAPTIONS[1][2]]),
    "000000391895": (b"moped", [COCO_CAPTIONS[0][2].strip(), COCO_CAPTIONS[3][2]]),
    "000000522418": (b"cake", "no caption"),
}
COCO_PICTURES = {"000000391895.jpg": "moped", "000000000009.jpg": "bins", "000000522418.jpg": "cake"}


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "annotations/train2017", "images", "annotations"])
def test_coco(tmp_path: Path, folder: str) -> None:
    write_files(tmp_path, {"annotations/captions_train2017.json": coco(COCO_IMAGES, COCO_CAPTIONS)})
    write_files(tmp_path, {f"{folder}/{name}": body for name, body in COCO_PICTURES.items()})
    write_files(tmp_path, {"val2017/000000391895.jpg": "another"})
    for spec in (tmp_path, tmp_path / "annotations" / "captions_train2017.json"):
        source = open_source(spec)
        assert contents(source) == COCO_READ
        assert source.describe() == f"coco {spec}: 3 samples"


def test_coco_of_2014_with_two_splits(tmp_path: Path) -> None:
    for split, number in (("train2014", 57870), ("val2014", 391895)):
        name = f"COCO_{split}_{number:012}.jpg"
        write_files(tmp_path, {f"{split}/{name}": split})
        write_files(tmp_path, {f"annotations/captions_{split}.json": coco({number: name}, [(1, number, split)])})
    with pytest.raises(UserError, match=r"holds 2 sets of captions: name one of .*captions_train2014\.json, "):
        open_source(tmp_path)
    source = open_source(tmp_path / "annotations" / "captions_val2014.json")
    assert contents(source) == {"COCO_val2014_000000391895": (b"val2014", ["val2014"])}


def test_coco_without_its_pictures_says_where_it_looked(tmp_path: Path) -> None:
    file = "annotations/captions_val2017.json"
    write_files(tmp_path, {file: coco(COCO_IMAGES, COCO_CAPTIONS), "train2017/000000000009.jpg": "elsewhere"})
    with pytest.raises(
        UserError, match=r"its pictures are missing: unpack val2017\.zip \(looked for 000000000009\.jpg in "
    ) as no:
        open_source(tmp_path)
    assert f"{tmp_path}/val2017, " in str(no.value)
    assert str(tmp_path / file) in str(no.value)


def test_coco_entries_that_cannot_be_used(tmp_path: Path) -> None:
    images = {1: "a.jpg", 2: "../up.jpg", 3: "/etc/hostname", 4: "b\ud800.jpg"}
    captions = [(1, 1, "good"), (2, 2, "x"), (3, 77, "x"), (4, 1, "half \ud800"), (5, 1, "  ")]
    whole = json.loads(coco(images, captions))
    whole["images"] += [{"id": 1, "file_name": "again.jpg"}, {"id": None, "file_name": "c.jpg"}, {"id": 9}]
    whole["annotations"] += [{"id": "x", "image_id": 1, "caption": "x"}, {"id": 6, "image_id": [1], "caption": "x"}]
    write_files(tmp_path, {"annotations/captions_train2017.json": json.dumps(whole), "train2017/a.jpg": "A"})
    source = open_source(tmp_path)
    assert contents(source) == {"a": (b"A", ["good"])}
    outside = "its path leads out of the folder"
    assert source.skipped == [
        ("image 2", outside),
        ("image 3", outside),
        ("image 4", "its file_name is not valid Unicode"),
        ("image 1", "duplicate id; its first picture is used"),
        ("image None", "has no id or no file_name"),
        ("image 9", "has no id or no file_name"),
        ("annotation 2", "its image 2 is not in the list of images"),
        ("annotation 3", "its image 77 is not in the list of images"),
        ("annotation 4", "its caption is not valid Unicode"),
        ("annotation x", "has no id or no caption"),
        ("annotation 6", "its image [1] is not in the list of images"),
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        ('[{"path": "a.jpg"}]', "is not COCO's captions .* has to end in .jsonl"),
        ('{"images": [], "annotations": 3}', "is not COCO's captions"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "bbox": []}]}', "holds no captions"),
    ],
)
def test_json_that_is_not_cocos_captions(tmp_path: Path, body: bytes | str, message: str) -> None:
    write_files(tmp_path, {"instances_train2017.json": body})
    with pytest.raises(UserError, match=r"instances_train2017\.json: " + message):
        open_source(tmp_path / "instances_train2017.json")


# --- CUB-200-2011: CUB_200_2011.tgz, and Reed's captions in text_c10


CUB_NAMES = [
    "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18",
    "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34",
    "002.Laysan_Albatross/Laysan_Albatross_0002_1027",
]


def cub(root: Path, captions: Path) -> Path:
    write_files(root, {"images.txt": "".join(f"{i + 1} {name}.jpg\n" for i, name in enumerate(CUB_NAMES))})
    write_files(root, {"classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n", "README": "CUB"})
    write_files(root, {f"images/{name}.jpg": name for name in CUB_NAMES})
    ten = {name: "".join(f"bird {i} of {name} . \n" for i in range(10)) for name in CUB_NAMES}
    write_files(captions, {f"{name}.txt": body for name, body in ten.items()})
    write_files(captions, {"001.Black_footed_Albatross.h5": b"\x89HDF", "001.Black_footed_Albatross.t7": b"4"})
    return root


CUB_READ = {name: (name.encode(), [f"bird {i} of {name} ." for i in range(10)]) for name in sorted(CUB_NAMES)}


@pytest.mark.parametrize("captions", ["text_c10", "text", "../text_c10", "../text"])
def test_cub(tmp_path: Path, captions: str) -> None:
    root = tmp_path / "birds" / "CUB_200_2011"
    cub(root, root / captions)
    for spec in (root, root.parent):
        source = open_source(spec)
        assert contents(source) == CUB_READ
        assert source.describe() == f"cub {spec}: 3 samples"


def test_cub_with_parts_missing(tmp_path: Path) -> None:
    root = cub(tmp_path / "CUB_200_2011", tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"holds CUB's pictures but no captions; put text_c10 beside images \(looked for .*/text_c10"
    ):
        open_source(root)
    (tmp_path / "elsewhere").rename(root / "text_c10")
    (root / "text_c10" / f"{CUB_NAMES[1]}.txt").unlink()
    (root / "text_c10" / f"{CUB_NAMES[0]}.txt").write_bytes(b"one\n\nd\xe9j\xe0\n  \nthree\n")
    (root / "images" / f"{CUB_NAMES[2]}.jpg").unlink()
    with (root / "images.txt").open("a") as index:
        index.write("4 ../../../etc/hostname\n\nfive\n")
    source = open_source(root)
    found = contents(source)
    gone = "cannot be read: No such file or directory"
    assert found[CUB_NAMES[1]] == (CUB_NAMES[1].encode(), f"the caption {gone}")
    assert found[CUB_NAMES[0]][1] == ["one", "three"]
    assert found[CUB_NAMES[2]][0] == f"the image {gone}"
    assert len(found[CUB_NAMES[2]][1]) == 10
    assert source.skipped == [
        ("line 4", "its path leads out of the folder"),
        ("line 6", "is not a number and a path"),
    ]


# --- Flickr8k and Flickr30k: the authors' archives, and Kaggle's


FLICKR = {
    "1000268201_693b08cb0e": ["A child in a pink dress .", 'A girl going into a "wooden" building .'],
    "1001773457_577c3a7d70": ["A black dog and a spotted dog are fighting", "Two dogs , in the road ."],
}
FLICKR_READ = {key: (key.encode(), captions) for key, captions in FLICKR.items()}
TOKENS = "".join(f"{key}.jpg#{i}\t{caption}\n" for key, several in FLICKR.items() for i, caption in enumerate(several))
BARS = "image_name| comment_number| comment\n" + "".join(
    f"{key}.jpg| {i}| {caption}\n" for key, several in FLICKR.items() for i, caption in enumerate(several)
)
COMMAS = "image,caption\n" + "".join(
    f"{key}.jpg,{caption}\n"
    if "," not in caption and '"' not in caption
    else f'{key}.jpg,"' + caption.replace('"', '""') + '"\n'
    for key, several in FLICKR.items()
    for caption in several
)


@pytest.mark.parametrize(
    ("file", "body", "images"),
    [
        ("Flickr8k.token.txt", TOKENS, "Flicker8k_Dataset"),
        ("Flickr8k_text/Flickr8k.token.txt", TOKENS, "Flicker8k_Dataset"),
        ("Flickr8k_text/Flickr8k.token.txt", TOKENS, "Flickr8k_Dataset/Flicker8k_Dataset"),
        ("results_20130124.token", TOKENS, "flickr30k-images"),
        ("results.csv", BARS, "flickr30k_images"),
        ("flickr30k_images/results.csv", BARS, "flickr30k_images/flickr30k_images"),
        ("captions.txt", COMMAS, "Images"),
        ("captions.txt", COMMAS, "."),
    ],
)
def test_flickr(tmp_path: Path, file: str, body: str, images: str) -> None:
    write_files(tmp_path, {file: body, **{f"{images}/{key}.jpg": key for key in FLICKR}})
    for spec in (tmp_path, tmp_path / file):
        source = open_source(spec)
        assert contents(source) == FLICKR_READ
        assert source.describe() == f"flickr {spec}: 2 samples"


def test_flickrs_known_faults(tmp_path: Path) -> None:
    key = next(iter(FLICKR))
    write_files(tmp_path, {f"flickr30k_images/{key}.jpg": "A"})
    # One line of Kaggle's file lacks a bar.
    write_files(tmp_path, {"results.csv": BARS + f"{key}.jpg| 4   A dog runs across the grass .\n{key}.jpg| 5| last\n"})
    source = open_source(tmp_path)
    assert source.skipped == [("line 6", "has 2 fields, not 3")]
    assert contents(source)[key] == (b"A", [*FLICKR[key], "last"])
    # One name in the authors' file is not that of a picture.
    write_files(tmp_path, {"Flicker8k_Dataset/a.jpg": "A", "Flickr8k.token.txt": "a.jpg#0\tone\na.jpg.1#0\ttwo\n"})
    assert contents(open_source(tmp_path / "Flickr8k.token.txt")) == {
        "a": (b"A", ["one"]),
        "a.jpg": ("the image cannot be read: No such file or directory", ["two"]),
    }


def test_flickr_without_its_pictures_says_where_it_looked(tmp_path: Path) -> None:
    write_files(tmp_path, {"results_20130124.token": TOKENS})
    with pytest.raises(UserError, match=r"results_20130124\.token: its pictures are missing: .*/flickr30k-images, "):
        open_source(tmp_path)


def test_other_files_with_flickrs_names(tmp_path: Path) -> None:
    write_files(tmp_path, {"results.csv": "path,caption\na.jpg,one\n", "a.jpg": "A"})
    assert open_source(tmp_path / "results.csv").format == "csv manifest"
    write_files(tmp_path, {"captions.txt": "the caption of a picture", "captions.jpg": "C"})
    assert contents(open_source(tmp_path))["captions"] == (b"C", ["the caption of a picture"])
    write_files(tmp_path, {"captions.txt": ""})
    assert contents(open_source(tmp_path))["captions"] == (b"C", "the caption is empty")


# --- all formats


def test_an_unknown_source_is_refused_with_the_known_formats(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.zip": "PK", "notes.txt": "hello", "words.token": "no tokens\n", "empty/x.log": ""})
    for name in ("a.zip", "notes.txt", "words.token", "empty"):
        with pytest.raises(UserError) as refusal:
            open_source(tmp_path / name)
        message = str(refusal.value)
        assert message.startswith(str(tmp_path / name))
        assert "\n" not in message
        assert all(kind.description in message for kind in FORMATS)


def test_unreadable_manifests_are_one_line(tmp_path: Path) -> None:
    for name in ("m.csv", "m.jsonl", "m.parquet", "captions_x.json"):
        write_files(tmp_path, {name: b"\0\1\2" * 100 + b"\n" + bytes(range(256))})
        with pytest.raises(UserError) as refusal:
            open_source(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value)
        assert "\n" not in str(refusal.value)
