from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Call
from helpers.generated_pictures import noise, write_coco, write_lines
from helpers.running import Chain

from dalle_cli.commands.eval_fid import parse_pool_sizes, parse_radii
from dalle_cli.errors import UserError


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


def test_the_command_on_one_system_and_on_several(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", images=6)
    wanted = tmp_path / "captions.jsonl"
    preset = (tmp_path / "coco", "--preset", "coco", "--draw", 5)
    assert call("eval-fid", *preset, "--write-captions", wanted).out == f"{wanted}\n"
    prompts = [json.loads(line) for line in wanted.read_text().splitlines()]
    manifest = write_lines(tmp_path / "ours", [line["caption"] for line in prompts], 2)
    measure = ("--clip", by_hand.clip, "--size", 32, "--cache", tmp_path / "cache")
    plain = call("eval-fid", manifest, tmp_path / "coco" / "val2014", *measure, "--out", tmp_path / "fid.json")
    assert plain.code == 0, plain.err
    assert plain.out == f"{tmp_path / 'fid.json'}\n"
    figures = json.loads((tmp_path / "fid.json").read_text())
    assert figures == json.loads(call("eval-fid", manifest, tmp_path / "coco" / "val2014", *measure).out) | {
        "command": figures["command"]
    }
    assert (figures["score_name"], figures["features"].split()[0]) == ("clip_is", "clip-image")
    (only,) = figures["systems"]
    assert (only["name"], only["generated"]) == ("generated", str(manifest))
    assert (only["n_generated"], only["n_reference"]) == (10, 6)
    assert {"fid", "kid_mean", "precision", "recall", "fid_error", "clip_is", "warnings"} <= only.keys()
    assert (only["clip_is"], only["blur"], only["pool"], only["accuracy"]) == (None, [], [], {})
    gan = tmp_path / "gan"
    gan.mkdir()
    for line in prompts:
        noise(int(line["id"])).save(gan / f"{line['id']}.png")
    seen = tmp_path / "seen.jsonl"
    seen.write_text('{"key": "val2014/000"}\n{"key": "val2014/999"}\n')
    whole = call(
        "eval-fid", "--system", f"ours={manifest}", "--system", f"gan={gan}", *preset, *measure,
        "--blur", "0,1", "--pool", "1,2", "--repeats", 2, "--bootstrap", 2, "--page", tmp_path / "page",
        "--without", seen,
    )  # fmt: skip
    assert whole.code == 0, whole.err
    found = json.loads(whole.out)
    assert [(s["name"], s["n_generated"], bool(s["pool"])) for s in found["systems"]] == [
        ("ours", 5, True),
        ("gan", 5, False),
    ]
    assert [(s["n_reference"], s["without"]["n_reference"]) for s in found["systems"]] == [(6, 5), (6, 5)]
    assert (found["without"], "compare only with" in found["comparable"]) == (str(seen), True)
    assert "without 1 of the 6 reference pictures" in (tmp_path / "page" / "index.html").read_text()
    assert found["protocol"].startswith("5 captions of COCO's val2014, drawn by seed 0")
    assert found == json.loads((tmp_path / "page" / "figures.json").read_text())
    assert (tmp_path / "page" / "index.html").read_text().count("<img ") == 2 + 3 * 5
    for arguments, words in {
        (gan,): "give GENERATED and REFERENCE",
        ("--system", "gan", gan): "is not NAME=GENERATED",
        ("--system", f"a={gan}", gan, gan): "the only argument is REFERENCE",
        (gan, gan, "--preset", "coco", "--captions", wanted): "exclude each other",
        ("--system", f"a={gan}", "--system", f"a={gan}", gan): "is given twice",
        (gan, gan, "--write-captions", wanted): "give --preset",
        (gan, gan, "--features", "tf_efficientnet_lite2", "--clip", by_hand.clip): "exclude each other",
        (gan, gan, "--clip", by_hand.clip, "--without", seen): "none of its 2 keys is in",
        (gan, gan, "--clip", by_hand.clip, "--without", gan / "absent.txt"): "--without: ",
        (gan, gan, "--pretrained", "openai"): "--pretrained needs --clip",
        (gan, gan, "--features", "no_such_network"): "is neither a folder nor a network of timm",
    }.items():
        assert words in call("eval-fid", *arguments).mistake()
