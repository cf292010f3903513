"""Reranking: its output, scores and sheet, that it begins before its input ends, and its refusals."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import Call
from helpers.running import DALLE, ENVIRONMENT, Chain
from PIL import Image
from torch import Tensor

from dalle_cli.clip.rerank import best_of_all, printed, rerank, score
from dalle_cli.errors import UserError
from dalle_cli.fid.systems import open_system
from dalle_cli.stores.scores import sample_stores, store_lines, write_scores

Line = dict[str, Any]
SHADES = {"dark": -1.0, "bright": 1.0}


class ShadeScorer:
    """A stand-in for a CLIP: a picture's feature is its mean shade, a caption's the shade that it asks for."""

    name = identity = "shades"
    logit_scale = 1.0
    captions_cut = 0

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.captions: list[str] = []
        self.threads: set[int] = set()

    def text_features(self, captions: Sequence[str]) -> Tensor:
        self.captions += captions
        return torch.tensor([[SHADES[caption]] for caption in captions])

    def prepare(self, picture: np.ndarray) -> Tensor:
        self.threads.add(threading.get_ident())
        return torch.tensor([float(picture.mean() / 255)])

    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        self.batches.append(len(prepared))
        return torch.stack(list(prepared))

    def image_features(self, pictures: Any) -> Tensor:
        return self.prepared_features([self.prepare(picture) for picture in pictures])


def draw(folder: Path, prompt: str, shades: Sequence[int], **more: Any) -> list[Line]:
    lines = []
    for index, shade in enumerate(shades):
        file = folder / f"{prompt}-{index}-{len(list(folder.iterdir()))}.png"
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file)
        lines.append({"prompt": prompt, "index": index, "png": str(file), **more})
    return lines


def test_lines_are_ranked_within_their_prompts_in_batches_across_them(tmp_path: Path) -> None:
    lines = draw(tmp_path, "bright", [10, 200, 90]) + draw(tmp_path, "dark", [50, 40, 40, 60])
    scorer = ShadeScorer()
    bright, dark = rerank(lines, scorer, batch=5)
    assert scorer.batches == [5, 2]
    assert scorer.captions == ["bright", "dark"]
    assert threading.get_ident() not in scorer.threads
    assert [(line["index"], line["rank"]) for line in bright] == [(1, 1), (2, 2), (0, 3)]
    # Equal pictures keep the order they were drawn in.
    assert [line["index"] for line in dark] == [1, 2, 0, 3]
    assert dark[0]["scorer"] == "shades"
    assert bright[0]["score"] == pytest.approx(200 / 255)
    assert json.loads(printed(bright[0])) == {**lines[1], "score": 0.784314, "rank": 1, "scorer": "shades"}
    best = best_of_all([bright, dark], 3)
    assert [(line["prompt"], line["index"], line["rank"]) for line in best] == [
        ("bright", 1, 1), ("bright", 2, 2), ("bright", 0, 3),
    ]  # fmt: skip


def test_scores_are_the_same_whether_pictures_are_prepared_beside_the_model_or_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = draw(tmp_path, "bright", range(70)) + draw(tmp_path, "dark", range(70))
    found = []
    for more in (0, 1):
        monkeypatch.setattr("dalle_cli.clip.rerank.available_cores", lambda more=more: torch.get_num_threads() + more)
        found.append(list(score(lines, ShadeScorer(), 64)))
    assert found[0] == found[1]
    assert [line["score"] for line in found[0][:70]] == pytest.approx([shade / 255 for shade in range(70)])


def test_a_prompt_leaves_while_its_successors_are_still_to_come(tmp_path: Path) -> None:
    """The producer waits for the first prompt's ranking before it gives another line."""
    lines = draw(tmp_path, "bright", [1, 2]) + draw(tmp_path, "dark", [1, 2])
    seen: Queue[str] = Queue()

    def slow() -> Iterator[Line]:
        yield from lines
        assert seen.get(timeout=30) == "bright"
        yield from draw(tmp_path, "bright", [3])

    ranked = rerank(slow(), ShadeScorer(), batch=2)
    first = next(ranked)
    assert [line["index"] for line in first] == [1, 0]
    seen.put(first[0]["prompt"])
    assert [pool[0]["prompt"] for pool in ranked] == ["dark", "bright"]


def test_a_prompt_that_comes_again_is_told_of_or_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = draw(tmp_path, "bright", [1]) + draw(tmp_path, "dark", [1]) + draw(tmp_path, "bright", [9, 5])
    assert [len(pool) for pool in rerank(lines, ShadeScorer())] == [1, 1, 2]
    assert capsys.readouterr().err.count("ranked apart") == 1
    together = list(rerank(lines, ShadeScorer(), gather=True))
    assert [[line["rank"] for line in pool] for pool in together] == [[1, 2, 3], [1]]
    assert [round(255 * line["score"]) for line in together[0]] == [9, 5, 1]
    assert capsys.readouterr().err == ""


def test_of_equal_scores_the_best_of_all_takes_the_earlier() -> None:
    pools = [[{"score": score, "index": index} for index, score in enumerate(scores)] for scores in ([2, 3, 2], [3, 2])]
    best = [(line["score"], line["index"], line["rank"]) for line in best_of_all(pools, 4)]
    assert best == [(3, 1, 1), (3, 0, 2), (2, 0, 3), (2, 2, 4)]
    assert best_of_all(pools, None)[:4] == best_of_all(pools, 4)
    assert len(best_of_all(pools, None)) == len(best_of_all(pools, 9)) == 5


def test_a_stream_of_captions_is_not_kept(tmp_path: Path) -> None:
    class Agreeable(ShadeScorer):
        def text_features(self, captions: Sequence[str]) -> Tensor:
            return torch.ones(len(captions), 1)

    (line,) = draw(tmp_path, "bright", [1])

    def peak(captions: int) -> int:
        stream = ({**line, "prompt": str(place // 20), "index": place % 20} for place in range(20 * captions))
        tracemalloc.start()
        try:
            assert sum(len(pool) for pool in rerank(stream, Agreeable(), batch=8)) == 20 * captions
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(5)  # what is made once
    assert (peak(100) - peak(20)) / (80 * 20) < 100, "bytes a sample; a dictionary takes 400"


def test_the_first_bad_picture_is_named(tmp_path: Path) -> None:
    lines = draw(tmp_path, "dark", [1, 2, 3, 4], store="s")
    Path(lines[2]["png"]).unlink()
    said = r"dark-2-2\.png: cannot be read as a picture \(.*No such file.*\); draw it again with dalle sample"
    with pytest.raises(UserError, match=said):
        list(score(lines, ShadeScorer(), 2))
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(lines[2]["png"])
    with pytest.raises(UserError, match=r"dark-2-2\.png: is 9 x 6 pixels where other samples of s are 8 x 8"):
        list(score(lines, ShadeScorer(), 2))
    del lines[2]["store"]
    assert len(list(score(lines, ShadeScorer(), 2))) == 4


def test_reading_ends_when_nobody_wants_more(tmp_path: Path) -> None:
    given = 0

    def endless() -> Iterator[Line]:
        nonlocal given
        (line,) = draw(tmp_path, "dark", [1])
        while True:
            given += 1
            yield line

    scores = score(endless(), ShadeScorer(), 2)
    next(scores)
    scores.close()  # type: ignore[attr-defined]
    stopped = given
    time.sleep(0.3)
    assert given == stopped <= 12


def make_store(folder: Path, prompts: list[str], n: int, **more: Any) -> Path:
    group = zarr.open_group(str(folder / "samples.zarr"), mode="a", zarr_format=3)
    rows = len(prompts) * n
    group.create_array("log_likelihood", shape=(rows,), dtype="float64")
    request = {"prompts": prompts, "seed": 3, "settings": {"n": n}, **more}
    group.attrs.update({"format": "dalle-samples", "version": 2, "rows": rows, "request": request})
    return folder / "samples.zarr"


def test_scores_are_kept_in_the_store_by_the_scorers_name(tmp_path: Path) -> None:
    store = make_store(tmp_path / "one", ["bright", "dark"], 2, first=5)
    assert sample_stores(tmp_path) == sample_stores(tmp_path / "one") == sample_stores(store) == [store]
    lines = list(store_lines(store))
    assert [(line["prompt"], line["index"], line["row"]) for line in lines] == [
        ("bright", 5, 0), ("bright", 6, 1), ("dark", 5, 2), ("dark", 6, 3),
    ]  # fmt: skip
    assert lines[3]["png"] == str(tmp_path / "one" / "00001-dark-00006.png")
    assert "score" not in lines[0]
    write_scores(store, [3, 0, 3], [0.0, 0.25, 1 / 3], "a")
    write_scores(store, [1], [0.5], "a")
    assert [line.get("score") for line in store_lines(store)] == [0.25, 0.5, None, 1 / 3]
    assert zarr.open_group(str(store))["clip_score"].attrs["scorer"] == "a"
    write_scores(store, [2], [0.125], "b")
    assert [line.get("score") for line in store_lines(store)] == [None, None, 0.125, None]
    assert sorted(path.name for path in store.iterdir()) == ["clip_score", "log_likelihood", "zarr.json"]
    with pytest.raises(UserError, match="has 4 rows and no row 4"):
        write_scores(store, [4], [1.0], "b")
    shard = make_store(tmp_path / "two", ["bright", "dark"], 2, shard="2/2")
    zarr.open_group(str(shard)).attrs["rows"] = 2
    assert [line["prompt"] for line in store_lines(shard)] == ["dark", "dark"]
    zarr.open_group(str(shard)).attrs["rows"] = 0
    with pytest.raises(UserError, match="holds no sample yet"):
        store_lines(shard)


def test_a_damaged_array_of_scores_is_one_line(tmp_path: Path) -> None:
    store = make_store(tmp_path / "one", ["bright", "dark"], 2)
    write_scores(store, [0], [0.5], "a")
    chunk = store / "clip_score" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"one/samples\.zarr: is no store of dalle sample, or damaged"):
        write_scores(store, [1], [0.25], "a")
    for other in (tmp_path / "one" / "00000-bright-00000.png", tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be opened"):
            write_scores(other, [0], [0.5], "a")


def test_scores_are_kept_when_the_reader_wants_no_more_lines(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    prompts = [f"a small red star number {number}" for number in range(3)]
    drawn = call("sample", by_hand.prior, *prompts, "--n", 2, "--out", tmp_path / "drawn")
    Path(drawn.lines[4]["png"]).write_text("no picture")
    stopped = call("rerank", tmp_path / "drawn", "--clip", by_hand.clip, "--batch-size", 2)
    assert "cannot be read as a picture" in stopped.mistake()
    kept = [line["row"] for line in store_lines(tmp_path / "drawn" / "samples.zarr") if "score" in line]
    assert kept == [line["row"] for line in sorted(stopped.lines, key=lambda line: line["row"])] == [0, 1]


@pytest.mark.parametrize(
    ("key", "value"), [("png", "a\0b"), ("png", "\ud800"), ("store", 7), ("store", "\0"), ("run", ["x"])]
)
def test_values_that_are_no_paths_are_refused(tmp_path: Path, call: Call, key: str, value: object) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "bright", "png": "a.png", key: value}) + "\n")
    assert f"{file}, line 1: its '{key}' is no path; give the lines of dalle sample" in call("rerank", file).mistake()


def test_the_command_reads_several_files_keeps_scores_and_draws_a_sheet(
    by_hand: Chain, call: Call, tmp_path: Path
) -> None:
    prompts = ("a small red star", "a large blue square")
    drawn = call("sample", by_hand.prior, *prompts, "--n", 3, "--out", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err
    texts = drawn.out.splitlines()
    for name, some in (("odd", texts[::2]), ("even", texts[1::2])):
        (tmp_path / name).write_text("\n".join(some))
    whole = tmp_path / "whole"
    whole.write_text(drawn.out)
    clip = ("--clip", by_hand.clip)
    one = call("rerank", whole, *clip, "--sheet", tmp_path / "sheet.png")
    assert one.code == 0, one.err
    assert [(line["prompt"], line["rank"]) for line in one.lines] == [(p, r) for p in prompts for r in (1, 2, 3)]
    store = zarr.open_group(str(tmp_path / "drawn" / "samples.zarr"))
    kept = np.asarray(store["clip_score"])
    assert {(line["row"], line["score"]) for line in one.lines} == {(r, round(float(s), 6)) for r, s in enumerate(kept)}
    assert store["clip_score"].attrs["scorer"] == one.lines[0]["scorer"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 200
    several = call("rerank", tmp_path / "odd", tmp_path / "even", *clip, "--batch-size", 6)
    assert [(line["prompt"], line["index"]) for line in several.lines] == [
        (line["prompt"], line["index"]) for line in one.lines
    ]
    # The samples lie outside the run, and name it.
    assert call("rerank", tmp_path / "drawn").lines == call("rerank", whole).lines == one.lines
    ours = open_system("ours", str(tmp_path / "drawn"), 32, None, None, 0)
    assert [[line["index"] for line in pool.lines] for pool in ours.pools] == [
        [line["index"] for line in one.lines if line["prompt"] == prompt] for prompt in prompts
    ]
    best = call("rerank", whole, *clip, "--overall", "--top", 2, "--no-write").lines
    assert [line["rank"] for line in best] == [1, 2]
    assert [line["score"] for line in best] == sorted((line["score"] for line in one.lines), reverse=True)[:2]


def test_ranking_begins_before_the_pipe_ends(by_hand: Chain, tmp_path: Path) -> None:
    lines = draw(tmp_path, "a red star", [1, 2]) + draw(tmp_path, "a blue cross", [3])
    process = subprocess.Popen(
        [DALLE, "rerank", "--clip", by_hand.clip, "--batch-size", "3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for line in lines:
        process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()
    # The producer has not ended: the first caption's ranking is here all the same.
    first = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [(line["prompt"], line["rank"]) for line in first] == [("a red star", 1), ("a red star", 2)]
    assert process.poll() is None
    out, _ = process.communicate(timeout=60)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a blue cross"]
    assert process.returncode == 0
