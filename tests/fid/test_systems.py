from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.generated_pictures import system, write_folder, write_lines

from dalle_cli.errors import UserError


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
