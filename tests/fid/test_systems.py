from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.generated_pictures import system, write_folder, write_lines

from dalle_cli.errors import UserError
from dalle_cli.stores.samples import STORE, SampleStore
from dalle_cli.stores.scores import sample_stores, write_scores


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


def write_store(folder: Path, prompts: list[str], n: int, scored: bool = True) -> Path:
    """Write a sample store without pictures, whose scores fall and then rise again within each caption."""
    rows = len(prompts) * n
    store = SampleStore(folder, {"prompts": prompts, "seed": 3, "settings": {"n": n}}, rows, 2, folder.parent / "run")
    store._group.attrs["rows"] = rows
    if scored:
        write_scores(folder / STORE, range(rows), np.abs(np.arange(rows) % n - n / 2 + 0.25).tolist(), "stand-in")
    return folder


def write_sample_lines(file: Path, lines: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_samples_of_several_stores_are_ranked_by_caption(tmp_path: Path) -> None:
    """A caption of two stores has one pool; of its samples that tie, those of the earlier line come first."""
    write_store(tmp_path / "all" / "1", ["a", "b"], 4)
    write_store(tmp_path / "all" / "2", ["b", "c"], 4)
    assert len(sample_stores(tmp_path / "all")) == 2
    ours = system("ours", tmp_path / "all")
    assert [(pool.prompt, len(pool.lines)) for pool in ours.pools] == [("a", 4), ("b", 8), ("c", 4)]
    found = [(Path(line["store"]).parent.name, line["index"], line["score"]) for line in ours.pools[1].lines]
    assert found == [(s, index, score) for index, score in ((0, 1.75), (3, 1.25), (1, 0.75), (2, 0.25)) for s in "12"]
    assert ours.captions == ["a"] * 4 + ["b"] * 8 + ["c"] * 4
    names = [ours.pictures.name(row) for row in range(len(ours.pictures))]
    assert names == [line["png"] for pool in ours.pools for line in pool.lines]
    # The same store named twice in lines holds the same samples, which count once.
    lines = [line for pool in ours.pools for line in pool.lines]
    twice = system("twice", write_sample_lines(tmp_path / "twice.jsonl", [*lines, *lines]))
    assert [list(pool.lines) for pool in twice.pools] == [list(pool.lines) for pool in ours.pools]


def test_samples_without_all_scores_keep_the_order_of_their_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": prompt, "png": f"{place}.png", "store": "s", "seed": 0, "index": 0, "score": 1.0}
        for place, prompt in enumerate(["b", " a", "b", "a"])
    ]
    del lines[1]["score"]
    ours = system("ours", write_sample_lines(tmp_path / "lines.jsonl", lines))
    assert ours.pools == []
    assert ours.captions == ["b", "a", "b", "a"]
    assert [ours.pictures.name(row) for row in range(4)] == ["0.png", "1.png", "2.png", "3.png"]
    by_caption = system("ours", tmp_path / "lines.jsonl", {"1": "a", "2": "b", "3": "a"})
    assert by_caption.captions == ["a", "a", "b", "b", "a", "a"]
    names = [by_caption.pictures.name(row) for row in range(6)]
    assert names == ["1.png", "3.png", "0.png", "2.png", "1.png", "3.png"]


@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("by_id", [False, True])
def test_a_sample_takes_few_bytes_of_memory(tmp_path: Path, as_lines: bool, by_id: bool) -> None:
    """They are at most 100 a sample beside the name of its file; a dictionary of one takes more than 1,000."""
    captions, n = {str(number): f"caption {number}" for number in range(200)}, 50
    spec = write_store(tmp_path / "samples", list(captions.values()), n)
    ours = system("ours", spec)
    assert len(ours.pictures) == 200 * n
    names = sum(len(Path(ours.pictures.name(row)).name) for row in range(len(ours.pictures)))
    if as_lines:
        ranked = (
            {**line, "rank": rank, "id": pool.prompt.split()[1]}
            for pool in ours.pools
            for rank, line in enumerate(pool.lines, 1)
        )
        spec = write_sample_lines(tmp_path / "lines.jsonl", ranked)
    traced = []
    for _ in range(3):  # the least, since libraries import modules late, and other threads may be at work
        tracemalloc.start()
        try:
            ours = system("ours", spec, captions if by_id else None)
            traced.append(tracemalloc.get_traced_memory())
        finally:
            tracemalloc.stop()
    assert (min(held for held, _ in traced) - names) / (200 * n) < 100
    assert (min(peak for _, peak in traced) - names) / (200 * n) < 200
    assert [len(pool.lines) for pool in ours.pools] == [n] * 200
