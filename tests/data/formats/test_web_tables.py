"""YFCC100M's and WIT's tables, as small copies of the published files, with some of their pictures."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote_plus

import pytest
from helpers.sources import write_files

from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError

PHOTOS = {
    "6985418911": (
        "4e2f7a26a1dfbf165a7e30bdabf7e72a",
        "Salt & lake",
        'Its <a href="x">shore</a> at dawn, 100% dry',
        "0",
    ),
    "4260631236": ("eb5f12a7b8c93d33ae3f6f7b3c6b9a10", "IMG_0393", "", "0"),
    "7304576856": ("d0a1b2c3d4e5f60718293a4b5c6d7e8f", "Caf\u00e9", "Two\ncups &amp; a jug", "0"),
    "3985000001": ("aaaabbbbccccddddeeeeffff00001111", "A film", "", "1"),
}
CAPTIONS = {
    "6985418911": ["Salt & lake", "Its shore at dawn, 100% dry"],
    "4260631236": ["IMG_0393"],
    "7304576856": ["Caf\u00e9", "Two cups & a jug"],
}


def yfcc_line(number: int, identifier: str, width: int) -> str:
    """Return a line in the order of the data set's own description."""
    digest, title, description, marker = PHOTOS[identifier]
    person = ["39089491@N00", "gwen+s", "2012-02-16 09:56:37.0", "1331840483", "Canon+EOS"]
    text = [quote_plus(title), quote_plus(description), "beach,salt", ""]
    place = ["-122.1", "37.5", "16", f"http://www.flickr.com/photos/{identifier}/"]
    download = f"http://farm8.staticflickr.com/7205/{identifier}_df7747990d.jpg"
    licence = ["Attribution License", "http://creativecommons.org/licenses/by/2.0/", "7205", "8", "df7747990d", "692d"]
    first = [str(number), identifier, digest] if width == 25 else [identifier]
    fields = [*first, *person, *text, *place, download, *licence, "jpg", marker]
    assert len(fields) == width
    return "\t".join(fields) + "\n"


def read(source: Source) -> dict[str, tuple[str, list[str]]]:
    """Return what a pickled copy reads of each picture that is there, by key."""
    source, found = pickle.loads(pickle.dumps(source)), {}
    for i in range(len(source)):
        with suppress(BadSample):
            found[source.key(i)] = (source.image_bytes(i).decode(), source.captions(i))
    return found


def by_hash(identifier: str) -> str:
    digest = PHOTOS[identifier][0]
    return f"{digest[:3]}/{digest[3:6]}/{digest}.jpg"


@pytest.mark.parametrize(
    ("width", "file", "place"),
    [
        (25, "yfcc100m_dataset", "data/images/HASH"),
        (25, "yfcc100m_dataset.tsv", "images/HASH"),
        (25, "part-3.tsv", "ID.jpg"),
        (23, "yfcc100m_dataset", "images/ID.jpg"),
        (23, "yfcc100m_dataset-0", "ID_df7747990d.jpg"),
    ],
)
def test_yfcc100m(tmp_path: Path, width: int, file: str, place: str) -> None:
    there = ["6985418911", "7304576856", "3985000001"]  # the second one was not downloaded; the last one is a video
    names = {key: place.replace("HASH", by_hash(key)).replace("ID", key) for key in there}
    lines = "".join(yfcc_line(number, key, width) for number, key in enumerate(PHOTOS))
    write_files(tmp_path, {file: lines, **{name: key for key, name in names.items()}})
    for spec in [tmp_path / file, *([tmp_path] if file.startswith("yfcc100m_dataset") and "-" not in file else [])]:
        source = open_source(spec)
        assert (source.format, len(source)) == ("yfcc100m", 3)
        assert source.skipped == [("line 4", "is a video")]
        keys = {key: name.removesuffix(".jpg") for key, name in names.items()}
        assert read(source) == {keys[key]: (key, CAPTIONS[key]) for key in there[:2]}


def test_yfcc100m_without_its_pictures_says_where_it_looked(tmp_path: Path) -> None:
    write_files(tmp_path, {"yfcc100m_dataset": yfcc_line(0, "6985418911", 25)})
    first = tmp_path / "images" / by_hash("6985418911")
    with pytest.raises(UserError, match=rf"none of its first pictures is on the disk \(looked for {first} \.\.\.\)"):
        open_source(tmp_path)


HEADER = (
    "language\tpage_url\timage_url\tpage_title\tsection_title\thierarchical_section_title\t"
    "caption_reference_description\tcaption_attribution_description\tcaption_alt_text_description\tmime_type\t"
    "original_height\toriginal_width\tis_main_image\tattribution_passes_lang_id\tpage_changed_recently\t"
    "context_page_description\tcontext_section_description\n"
)


def wit_line(language: str, image: str, reference: str, attribution: str, alt: str) -> str:
    url = f"http://upload.wikimedia.org/wikipedia/commons/a/a6/{image}"
    page = [language, "https://x.wikipedia.org/wiki/X", url, "X", "", "X"]
    texts = [f'"{text}"' if '"' in text else text for text in (reference, attribution, alt)]
    return "\t".join([*page, *texts, "image/jpeg", "10", "20", "true", "true", "true", "about X", ""]) + "\n"


@pytest.mark.parametrize("decoded", [True, False])
def test_wit(tmp_path: Path, decoded: bool) -> None:
    tower = "Tour_Eiffel_%281889%29.jpg"
    name = "Tour_Eiffel_(1889).jpg" if decoded else tower
    body = HEADER
    body += wit_line("en", tower, "The tower", 'English: the ""iron"" tower', "")
    body += wit_line("en", "Not_there.png", "gone", "", "")
    body += wit_line("fr", tower, "La tour", "", "tour de fer")
    write_files(tmp_path, {"wit_v1.train.all-1percent_sample.tsv": body, f"images/{name}": "tower"})
    for spec in (tmp_path, tmp_path / "wit_v1.train.all-1percent_sample.tsv"):
        source = open_source(spec)
        assert (source.format, len(source)) == ("wit", 2)
        captions = ["The tower", 'English: the "iron" tower', "La tour", "tour de fer"]
        assert read(source) == {f"images/{name.removesuffix('.jpg')}": ("tower", captions)}
    write_files(tmp_path, {"wit_v1.train.all-00001-of-00010.tsv": body})
    with pytest.raises(UserError, match=r"holds 2 tables of WIT: name one of .*1percent_sample\.tsv"):
        open_source(tmp_path)


def test_a_compressed_table_is_refused(tmp_path: Path) -> None:
    for name in ("wit_v1.train.all-1percent_sample.tsv.gz", "captions.csv.bz2"):
        write_files(tmp_path, {name: b"\x1f\x8b"})
        with pytest.raises(UserError, match=rf"{name}: is compressed; unpack it first"):
            open_source(tmp_path / name)
