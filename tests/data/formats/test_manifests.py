from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.sources import write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.data.formats.tables import Columns, find_columns
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError

Rows = Sequence[tuple[str, str]]  # (path, caption)


def contents(source: Source) -> list[tuple[str, bytes | str, list[str] | str]]:
    """Return (key, image bytes, captions) of each sample, or the reason where one cannot be read."""
    found = []
    for i in range(len(source)):
        row: list[object] = [source.key(i)]
        for read in (source.image_bytes, source.captions):
            try:
                row.append(read(i))
            except BadSample as error:
                row.append(str(error))
        found.append(tuple(row))
    assert len({row[0] for row in found}) == len(found)
    return found


# Writers that share no code with the package, after RFC 4180.


def quoted(field: str, delimiter: str) -> str:
    needs = any(letter in field for letter in f'{delimiter}"\r\n')
    return '"' + field.replace('"', '""') + '"' if needs else field


def write_delimited(path: Path, rows: Rows, delimiter: str, newline: str = "\n") -> None:
    lines = [("path", "caption"), *rows]
    text = "".join(delimiter.join(quoted(field, delimiter) for field in line) + newline for line in lines)
    path.write_bytes(text.encode())


def write_json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps({"path": p, "caption": c}) + "\n" for p, c in rows))


def write_parquet(path: Path, rows: Rows) -> None:
    table = pa.table({"path": [p for p, _ in rows], "caption": [c for _, c in rows]})
    pq.write_table(table, path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": lambda path, rows: write_delimited(path, rows, ","),
    "tsv": lambda path, rows: write_delimited(path, rows, "\t", "\r\n"),
    "jsonl": write_json_lines,
    "parquet": write_parquet,
}

letters = st.sampled_from(list(",\t;|\"'\n\r #aé漢🙂\\{}\u2028\x0b\ufeff")) | st.characters(codec="utf-8")
captions = st.text(letters.filter(lambda letter: letter != "\0"), max_size=12)


@pytest.mark.parametrize("ending", WRITERS)
@settings(max_examples=50)
@given(rows=st.lists(st.tuples(st.sampled_from(["a/1.jpg", "b/1.jpg", "b, 1;.png", 'q".gif', "ö/1.webp"]), captions)))
def test_a_written_manifest_is_read_back(tmp_path_factory: pytest.TempPathFactory, ending: str, rows: Rows) -> None:
    root = tmp_path_factory.mktemp("m")
    manifest = root / f"all.{ending}"
    WRITERS[ending](manifest, rows)
    if not rows:
        with pytest.raises(UserError, match=re.escape(str(manifest))):
            open_source(manifest)
        return
    expected: dict[str, list[str]] = {}  # in the order of the pictures' first rows
    for path, caption in rows:
        expected.setdefault(path, []).append(caption.strip())
        write_files(root, {path: path})
    source = open_source(manifest)
    assert source.skipped == []
    assert source.format == f"{ending} manifest"
    found = contents(source)
    assert [(key, image) for key, image, _ in found] == [(p.rpartition(".")[0], p.encode()) for p in expected]
    for (_, _, read), wanted in zip(found, expected.values(), strict=True):
        assert read == ([caption for caption in wanted if caption] or "the caption is empty")
    assert contents(pickle.loads(pickle.dumps(source))) == found


@pytest.mark.parametrize("ending", WRITERS)
def test_equal_names_in_two_folders_stay_apart(tmp_path: Path, ending: str) -> None:
    write_files(tmp_path, {"x/1.jpg": "X", "y/1.jpg": "Y", "1.jpg": "top"})
    rows = [("y/1.jpg", "of y"), ("x/1.jpg", "of x"), ("./1.jpg", "top"), ("y//1.jpg", "of y again")]
    WRITERS[ending](tmp_path / f"m.{ending}", rows)
    assert contents(open_source(tmp_path / f"m.{ending}")) == [
        ("y/1", b"Y", ["of y", "of y again"]),
        ("x/1", b"X", ["of x"]),
        ("1", b"top", ["top"]),
    ]


@pytest.mark.parametrize("ending", WRITERS)
def test_names_that_differ_in_the_extension_alone_keep_it(tmp_path: Path, ending: str) -> None:
    write_files(tmp_path, {"a.jpg": "J", "a.png": "P", "b.png": "B"})
    WRITERS[ending](tmp_path / f"m.{ending}", [("a.png", "p"), ("b.png", "b"), ("a.jpg", "j")])
    assert contents(open_source(tmp_path / f"m.{ending}")) == [
        ("a.png", b"P", ["p"]),
        ("b.png", b"B", ["b"]),
        ("a.jpg", b"J", ["j"]),
    ]


# --- columns


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["id", "caption", "file_name"], Columns("file_name", ("caption",), "id")),
        (["TEXT", "URL", "key"], Columns("URL", ("TEXT",), "key")),
        ([" Image ", "comment_number", " comment"], Columns(" Image ", (" comment",), None)),
        (["filepath", "title", "url"], Columns("filepath", ("title",), None)),
        (["image_path", "path", "text", "captions"], Columns("path", ("captions",), None)),
        (
            ["file", "caption_10", "caption_2", "caption_1"],
            Columns("file", ("caption_1", "caption_2", "caption_10"), None),
        ),
        (["path", "words"], None),
        (["photo", "caption"], None),
        ([], None),
    ],
)
def test_columns_are_found_by_name(names: list[str], found: Columns | None) -> None:
    assert find_columns(names) == found


def test_a_column_of_keys_names_the_samples(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": "A", "b.jpg": "B"})
    write_files(tmp_path, {"m.csv": "id,file,caption\n7,b.jpg,one\n9,a.jpg,two\n8,b.jpg,three\n"})
    expected = [("7", b"B", ["one", "three"]), ("9", b"A", ["two"])]
    assert contents(open_source(tmp_path / "m.csv")) == expected
    lines = [{"id": 7, "file": "b.jpg", "caption": ["one", "three"]}, {"id": 9, "file": "a.jpg", "caption": "two"}]
    write_files(tmp_path, {"m.jsonl": "\n".join(map(json.dumps, lines))})
    assert contents(open_source(tmp_path / "m.jsonl")) == expected
    table = pa.table({"id": [7, 9], "file": ["b.jpg", "a.jpg"], "caption": [["one", "three"], ["two", None]]})
    pq.write_table(table, tmp_path / "m.parquet")
    assert contents(open_source(tmp_path / "m.parquet")) == expected


def test_keys_that_are_not_unique_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"m.csv": "id,file,caption\n1,a.jpg,x\n2,b.jpg,x\n3,b.jpg,x\n2,c.jpg,x\n"})
    with pytest.raises(UserError, match=r"m\.csv: the id '2' stands for two pictures, b\.jpg and c\.jpg; "):
        open_source(tmp_path / "m.csv")
    write_files(tmp_path, {"m.csv": "id,file,caption\n1,a.jpg,x\n,b.jpg,x\n"})
    with pytest.raises(UserError, match=r"m\.csv: line 3: the id is empty"):
        open_source(tmp_path / "m.csv")


def test_several_captions_in_columns_and_lists(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": "A", "m.csv": "file_name,split,caption_0,caption_1\na.jpg,train,one,two\n"})
    assert contents(open_source(tmp_path / "m.csv")) == [("a", b"A", ["one", "two"])]
    write_files(tmp_path, {"m.jsonl": '{"image": "a.jpg", "captions": ["one", " ", 3, "two", "\\ud800"]}\n'})
    assert contents(open_source(tmp_path / "m.jsonl")) == [("a", b"A", ["one", "two"])]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_the_delimiter_follows_from_the_header(tmp_path: Path, delimiter: str, ending: str) -> None:
    write_files(tmp_path, {"a.jpg": "A"})
    write_delimited(tmp_path / f"m.{ending}", [("a.jpg", "one, two; three | four\tfive")], delimiter)
    assert contents(open_source(tmp_path / f"m.{ending}"))[0][2] == ["one, two; three | four\tfive"]


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {"a.jpg": "A", "m.csv": "\ufeffpath,caption\na.jpg,one\n", "m.jsonl": '\ufeff{"path":"a.jpg","text":"one"}'},
    )
    for name in ("m.csv", "m.jsonl"):
        assert contents(open_source(tmp_path / name)) == [("a", b"A", ["one"])]


# --- rows that cannot be used


def test_broken_rows_are_reported_and_shift_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{name}.jpg": name for name in "abcdef"})
    lines = [
        b"path,caption",
        b"a.jpg,one, two",
        b'b.jpg,"never closed',
        b"c.jpg,of c",
        b"",
        b'd.jpg,"of ""d"" in',
        b'two lines"',
        b"e.jpg,caf\xe9",
        b",no picture",
        b"\xff.jpg,x",
        b'f.jpg,"of f" and more',
        b"f.jpg,of f",
    ]
    write_files(tmp_path, {"m.csv": b"\n".join(lines)})
    source = open_source(tmp_path / "m.csv")
    assert contents(source) == [
        ("c", b"c", ["of c"]),
        ("d", b"d", ['of "d" in\ntwo lines']),
        ("e", b"e", "the caption is not UTF-8 (byte 3)"),
        ("f", b"f", ["of f"]),
    ]
    assert [where for where, _ in source.skipped] == ["line 2", "line 3", "line 9", "line 10", "line 11"]
    assert source.skipped[0] == ("line 2", "has 3 fields, not 2")
    assert "not well-formed" in source.skipped[1][1]
    assert source.skipped[2][1] == "names no picture"
    assert source.describe() == f"csv manifest {tmp_path}/m.csv: 4 samples, 5 left out"


def test_broken_json_lines_are_reported(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": "A", "b.jpg": "B"})
    lines = [
        b'{"path": "a.jpg", "caption": "of a"}',
        b'{"path": "b.jpg", "caption": ',
        b"",
        b'["b.jpg"]',
        b'{"path": null, "caption": "x"}',
        b'{"path": "\\ud800.jpg", "caption": "x"}',
        b'{"path": "b\\u0000.jpg", "caption": "x"}',
        b'{"path": "b.jpg", "caption": "caf\xe9"}',
        b"[" * 100_000,
        b'{"path": "b.jpg", "caption": null}',
    ]
    write_files(tmp_path, {"m.jsonl": b"\r\n".join(lines)})
    source = open_source(tmp_path / "m.jsonl")
    assert contents(source) == [("a", b"A", ["of a"]), ("b", b"B", "no caption")]
    assert [(where, reason[:12]) for where, reason in source.skipped] == [
        ("line 2", "is not valid"),
        ("line 4", "is not a JSO"),
        ("line 5", "names no pic"),
        ("line 6", "the picture'"),
        ("line 7", "the picture'"),
        ("line 8", "is not UTF-8"),
        ("line 9", "is not valid"),
    ]


def test_pictures_that_cannot_be_read_have_a_reason(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": "A", "folder.jpg/x": ""})
    os.mkfifo(tmp_path / "pipe.jpg")
    write_json_lines(tmp_path / "m.jsonl", [(f"{name}.jpg", "x") for name in ("a", "folder", "pipe", "gone")])
    assert [image for _, image, _ in contents(open_source(tmp_path / "m.jsonl"))] == [
        b"A",
        "the image is not an ordinary file",
        "the image is not an ordinary file",
        "the image cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("ending", WRITERS)
def test_a_changed_manifest_is_noticed(tmp_path: Path, ending: str) -> None:
    write_files(tmp_path, {"a.jpg": "A", "b.jpg": "B"})
    manifest = tmp_path / f"m.{ending}"
    WRITERS[ending](manifest, [("a.jpg", "one"), ("b.jpg", "two")])
    source = open_source(manifest)
    WRITERS[ending](manifest, [("b.jpg", "two"), ("a.jpg", "one")])
    os.utime(manifest, ns=(1, 1))
    with pytest.raises(UserError, match="has changed since it was indexed"):
        source.captions(0)


# --- refusals


def test_urls(tmp_path: Path) -> None:
    rows = [("https://x.org/a.jpg", "of a"), ("a.jpg", "here"), ("http://x.org/b.jpg?c", "of b")]
    for ending, writer in WRITERS.items():
        manifest = tmp_path / f"m.{ending}"
        writer(manifest, [rows[0], rows[2]])
        with pytest.raises(
            UserError, match=r"its pictures are URLs \(https://x\.org/a\.jpg \.\.\.\): download them first"
        ):
            open_source(manifest)
        write_files(tmp_path, {"a.jpg": "A"})
        writer(manifest, rows)
        reason = "is a URL: download the picture first and put its path in its place"
        assert contents(open_source(manifest)) == [
            ("https://x.org/a", reason, ["of a"]),
            ("a", b"A", ["here"]),
            ("http://x.org/b", reason, ["of b"]),
        ]


def test_pictures_that_are_elsewhere_are_refused_at_once(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "m.jsonl", [(f"pics/{i}.jpg", "x") for i in range(500)])
    with pytest.raises(UserError, match=rf"none of its pictures exists \(looked for {tmp_path}/pics/0\.jpg \.\.\.\)"):
        open_source(tmp_path / "m.jsonl")
    write_files(tmp_path, {"pics/499.jpg": "last"})  # a few are enough
    assert len(open_source(tmp_path / "m.jsonl")) == 500


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("m.csv", "", "its first line is empty"),
        ("m.csv", "\n\npath,caption\n", "its first line is empty"),
        ("m.csv", "path,caption\n", "names no pictures"),
        (
            "m.csv",
            "photo,words\na.jpg,x\n",
            r"line 1 names no columns of pictures .*its columns: photo, words; looked for path",
        ),
        ("m.csv", "path,caption\n".encode("utf-16"), r"is not UTF-8 \(byte 0\); save it as UTF-8"),
        ("m.csv", "path,caption\ra.jpg,x\r", "line 1 is not well-formed"),
        ("m.csv", "path,caption\n,x\n", "names no pictures; left out: line 2: names no picture"),
        ("m.tsv", "just a line\nand another\n", "line 1 names no columns"),
        ("m.tsv", "a.jpg\tb.jpg\n", "line 1 names no columns"),
        ("m.jsonl", "", "no columns .*its columns: none"),
        ("m.jsonl", '{"picture": "a.jpg", "words": "x"}', "its columns: picture, words"),
        ("m.jsonl", "hello\n", "its columns: none"),
        ("m.parquet", "PAR1 nonsense", "is not a readable Parquet file"),
        ("m.parquet", "", "is not a readable Parquet file"),
    ],
)
def test_files_that_are_not_manifests_are_refused(tmp_path: Path, name: str, body: str | bytes, message: str) -> None:
    write_files(tmp_path, {name: body})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name)) + ".*" + message) as refusal:
        open_source(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_parquet_of_other_types_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"], "text": [1.5]}), path)
    with pytest.raises(UserError, match="the column text holds double, not text"):
        open_source(path)
    pq.write_table(pa.table({"image": ["a.jpg"], "words": ["x"]}), path)
    with pytest.raises(UserError, match=r"has no columns .*its columns: image, words"):
        open_source(path)


def test_parquet_types_and_nulls(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": "A", "b.jpg": "B"})
    image = pa.array(["a.jpg", "b.jpg", None]).dictionary_encode()
    pq.write_table(
        pa.table({"image": image, "text": pa.array(["of a", None, "x"], pa.large_string())}), tmp_path / "m.parquet"
    )
    source = open_source(tmp_path / "m.parquet")
    assert contents(source) == [("a", b"A", ["of a"]), ("b", b"B", "no caption")]
    assert source.skipped == [("row 3", "names no picture")]


# --- layouts without a header, and a folder with its manifest


def test_conceptual_captions_layout(tmp_path: Path) -> None:
    write_files(tmp_path, {"p/1": "one", "p/2.jpg": "two"})
    lines = ['a "quoted start , never closed\tp/1', '" all quoted "\tp/2.jpg', "gone\thttp://x.org/3"]
    write_files(tmp_path, {"Train_GCC-training.tsv": "\n".join(lines)})
    reason = "is a URL: download the picture first and put its path in its place"
    expected = [
        ("p/1", b"one", ['a "quoted start , never closed']),
        ("p/2", b"two", ['" all quoted "']),
        ("http://x.org/3", reason, ["gone"]),
    ]
    assert contents(open_source(tmp_path / "Train_GCC-training.tsv")) == expected
    turned = ["\t".join(reversed(line.split("\t"))) for line in lines]  # the layout of Conceptual 12M
    write_files(tmp_path, {"cc12m.tsv": "\n".join(turned)})
    assert contents(open_source(tmp_path / "cc12m.tsv")) == expected
    write_files(tmp_path, {"urls.tsv": "a dog\thttp://x.org/1\na cat\thttp://x.org/2\n"})
    with pytest.raises(UserError, match="its pictures are URLs"):
        open_source(tmp_path / "urls.tsv")


def test_a_folder_with_its_metadata(tmp_path: Path) -> None:
    write_files(tmp_path, {"train/1.jpg": "1", "train/2.jpg": "2", "metadata.csv": "file_name,text\ntrain/2.jpg,two\n"})
    source = open_source(tmp_path)
    assert source.name == str(tmp_path)
    assert contents(source) == [("train/2", b"2", ["two"])]
    write_files(tmp_path, {"metadata.jsonl": "{}"})
    with pytest.raises(UserError, match="holds 2 manifests"):
        open_source(tmp_path)
