from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.tiny_chain import HELD_OUT, SAMPLES, SEEN, TinyChain, build_chain, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from dalle_cli.app import app
from dalle_cli.config.load import load_recipe
from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError
from dalle_cli.report.exhibits import choose_captions, true_pictures
from dalle_cli.report.report import write_report
from dalle_cli.shapes.accuracy import (
    JudgedPool,
    Pool,
    accuracy,
    best_of_subset,
    claim_of,
    group_by_caption,
    group_of,
    judge,
    pool_sizes,
)
from dalle_cli.shapes.world import phrasings, random_scene, render
from dalle_cli.stores.provenance import read_commands, record_command
from dalle_cli.stores.tokens import TokenReader

Line = dict[str, Any]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None)
def test_best_of_a_subset_is_the_mean_over_all_subsets(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(range(len(right)), k))
    # Places are in rank order, so a subset's best is its least place.
    assert best_of_subset(right, k) == pytest.approx(sum(right[min(s)] for s in subsets) / len(subsets))


def test_sizes_of_pools_double_up_to_the_whole() -> None:
    assert [pool_sizes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    for k in (0, 3):
        with pytest.raises(ValueError, match="a subset of"):
            best_of_subset([True, False], k)


def ranked_pictures(folder: Path, split: str, count: int, drawn: Callable[[int], int]) -> list[Line]:
    """Lines for captions of scenes 0 to count - 1, the picture of scene i being that of scene drawn(i)."""
    lines: dict[str, Line] = {}
    for i in range(count):
        file = folder / f"{split}-{i}.png"
        Image.fromarray(render(random_scene(0, split, drawn(i)))).save(file)
        caption = phrasings(random_scene(0, split, i))[0]
        lines[caption] = {"prompt": caption, "png": str(file), "index": 0, "score": 0.5, "rank": 1}
    return list(lines.values())


@pytest.mark.parametrize(("split", "group"), [("seen", "seen pairs"), ("heldout", "held-out pairs")])
def test_true_pictures_are_right_and_swapped_ones_wrong(tmp_path: Path, split: str, group: str) -> None:
    n = 16
    lines = ranked_pictures(tmp_path, split, n, lambda i: i)
    true = accuracy(judge(group_by_caption(lines, "lines")))
    assert (true.best.value, true.best.error, true.best.prompts) == (1.0, 0.0, len(lines))
    assert len(lines) > n - 3
    swapped = judge(group_by_caption(ranked_pictures(tmp_path, split, n, lambda i: (i + 1) % n), "lines"))
    assert {item.group for item in swapped} == {group}
    wrong = accuracy(swapped)
    assert wrong.best.value == 0
    assert wrong.single is not None
    assert wrong.single.value == 0


def judged(right: list[bool], indices: list[int] | None = None) -> JudgedPool:
    lines = tuple({"index": i} for i in (indices or range(len(right))))
    return JudgedPool(Pool("a large red tee", lines), "seen pairs", tuple(right))


def test_figures_of_a_group_by_hand() -> None:
    found = accuracy([judged([True, False, False, True]), judged([False, True, False, False])])
    assert found.single is not None
    assert found.any_right is not None
    assert (found.prompts, found.samples, found.pool_size) == (2, 8, 4)
    assert found.single.value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found.best.value == 0.5
    assert found.best.error == pytest.approx((0.25 / 2) ** 0.5)
    assert found.any_right.value == 1.0
    # Of the six pairs of four, the best is sample 1 in three, sample 2 in two, sample 3 in one.
    assert found.by_pool_size[2].value == pytest.approx((3 / 6 + 2 / 6) / 2)
    assert found.by_pool_size[1] == found.single
    assert found.by_pool_size[4] == found.best


def test_the_best_alone_tell_nothing_of_single_samples() -> None:
    found = accuracy([judged([True, True], indices=[6, 3]), judged([False, True])])
    assert found.best.value == 0.5
    assert found.single is None
    assert found.any_right is None
    assert found.by_pool_size == {}


def test_lines_are_gathered_by_caption_best_first() -> None:
    lines = [
        {"prompt": p, "png": "x", "index": i, "score": s, "rank": r}
        for p, i, s, r in [("b", 0, 0.1, 3), ("a", 0, 0.5, 1), ("b", 2, 0.3, 2), ("b", 1, 0.3, 1)]
    ]
    found = group_by_caption(lines, "f")
    assert [(pool.prompt, [line["index"] for line in pool.lines]) for pool in found] == [("b", [1, 2, 0]), ("a", [0])]
    twice = [{**line, "seed": 0, "store": "s", "png": f"{n}.png"} for n in range(2) for line in lines]
    assert [[line["png"] for line in pool.lines] for pool in group_by_caption(twice, "f")] == [["0.png"] * 3, ["0.png"]]
    with pytest.raises(UserError, match=r"f, sample 2: has no score and rank.*dalle rerank"):
        group_by_caption([lines[0], {"prompt": "a", "png": "x"}], "f")


def test_a_held_out_pair_anywhere_counts() -> None:
    groups = {caption: (claim := claim_of(caption)) and group_of(claim) for caption in (SEEN, HELD_OUT, "a cat")}
    assert groups == {SEEN: "seen pairs", HELD_OUT: "held-out pairs", "a cat": None}
    both = claim_of("a large red tee left of a small green bar")
    assert both is not None
    assert group_of(both) == "held-out pairs"


def test_captions_of_the_sheet_are_the_first_of_each_kind() -> None:
    def pool(prompt: str) -> Pool:
        return Pool(prompt, ({},))

    seen = [pool("a large red tee"), *(pool(f"words {i}") for i in range(20))]
    held = [pool(HELD_OUT)] * 20
    both = choose_captions(seen + held)
    assert len(both) == 12
    assert both == seen[:6] + held[:6]
    assert choose_captions(seen) == seen[:12]
    assert choose_captions(held) == held[:12]
    assert choose_captions(held + seen[:2]) == held[:10] + seen[:2]


class Page(HTMLParser):
    """Collects what matters of a page, and checks that tags close."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, Image.Image] = {}
        self.links: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            kind, _, data = str(values["src"]).partition(",")
            assert kind == "data:image/png;base64"
            self.images[str(values["alt"])] = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        self.links += [
            str(value) for name, value in attrs if name in ("href", "src") and not str(value).startswith("data:")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def write_fid(folder: Path, name: str, features: str, **extra: object) -> Path:
    figures = {"generated": "g <x>", "reference": "r", "features": features, "fid": 12.34, "kid_mean": 0.01,
               "kid_std": None, "n_generated": 100, "n_reference": 90,
               "warnings": ["few <pictures>"], **extra}  # fmt: skip
    file = folder / name
    file.write_text(json.dumps(figures))
    return file


def test_the_report_of_a_whole_chain(chain: TinyChain, tmp_path: Path) -> None:
    fids = [
        write_fid(tmp_path, "a.json", "clip-image runs/clip", clip_is=2.5),
        write_fid(tmp_path, "b.json", "inception-v3"),
    ]
    report = write_report(chain.recipe, chain.ranked, fids, tmp_path / "out")
    assert report.html == tmp_path / "out" / "report.html"
    text = report.html.read_text()
    page = Page(text)
    assert page.links == []
    assert not re.search(r"url\(|@import|<script", text)
    assert page.headings == [
        "Captions drawn right", "Samples", "Accuracy and reranking", "dVAE reconstructions", "Use of the codebook",
        "Training", "FID", "Data", "How samples were drawn", "Artifacts", "Commands",
    ]  # fmt: skip
    assert "the smallest <chain>" in page.text
    assert "g <x>" in page.text
    assert "few <pictures>" in page.text
    assert "CLIP features" in page.text
    assert "Inception features" in page.text
    assert "never with published FID" in page.text
    assert page.text.count("✓") == 6
    assert "✗" not in page.text
    assert len(page.images) == 2 + 2 + 1 + 6

    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures == json.loads(json.dumps(report.figures))
    assert figures["result"] in page.text.replace("\xa0", " ")
    assert set(figures["oracle"]["groups"]) == {"seen pairs", "held-out pairs"}
    assert figures["oracle"]["groups"]["seen pairs"]["samples"] == SAMPLES
    assert figures["missing"] == []
    assert [fid["fid"] for fid in figures["fid"]] == [12.34, 12.34]
    assert figures["contact_sheet"]["captions"] == [SEEN, HELD_OUT]
    assert figures["stages"]["prior"]["step"] == 2
    assert figures["stages"]["prior"]["last"]["step"] == 2
    paths = {row["artifact"]: row["path"] for row in figures["artifacts"]}
    assert paths == {
        "tokenizer": "tokenizer/tokenizer.json", "token store": "tokens.zarr", "dVAE": "dvae/step-00000002",
        "prior": "prior/step-00000002", "CLIP": "clip/step-00000002", "samples": "samples/one/samples.zarr",
    }  # fmt: skip

    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), np.asarray(page.images["contact sheet of samples"]))


def test_an_evaluation_and_the_commands_in_the_run_are_found(chain: TinyChain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain.places.root, run)
    point = {"fid": 3.0, "fid_error": 0.5, "kid_mean": 0.1, "kid_std": None, "precision": 0.5, "recall": 0.5,
             "n_generated": 4, "n_reference": 5}  # fmt: skip
    systems = [
        {"name": name, "generated": name, "features": "clip-image x", "feature_dimensions": 2, "warnings": ["few"],
         **point, "blur": [{"radius": r, **point} for r in (0.0, 2.0)],
         **({"pool": [{"size": k, "repeats": 2, **point} for k in (1, 2)]} if name == "ours <a>" else {})}
        for name in ("ours <a>", "training")
    ]  # fmt: skip
    evaluation = {"format": "dalle-eval-fid", "version": 1, "command": "dalle eval-fid --page 'run/e <b>'",
                  "reference": "seen", "size": 32, "features": "clip-image x", "bootstrap": 2, "systems": systems,
                  "warnings": ["counts <differ>"]}  # fmt: skip
    (run / "evaluation").mkdir()
    (run / "evaluation" / "figures.json").write_text(json.dumps(evaluation))
    (run / "fid.json").write_text(json.dumps(evaluation))  # the same command's --out
    prior = next((run / "prior").glob("step-*"))
    monkey = ["dalle", "train-prior", "tiny.yaml", "--set", "a b"]
    with mock.patch.object(sys, "argv", monkey):
        record_command(prior, "f" * 64)
        record_command(prior, "f" * 64)
        record_command(run / "tokenizer" / "tokenizer.json")
        record_command(run / "samples" / "one")
        record_command(run / "tokens.zarr.parts" / "image-0001-of-0002.zarr")
    with (run / "commands.jsonl").open("a") as journal:
        journal.write('{"artifact": "half')
    assert [line["artifact"] for line in read_commands(run)] == [
        "prior/step-00000002", "tokenizer/tokenizer.json", "samples/one", "tokens.zarr.parts/image-0001-of-0002.zarr",
    ]  # fmt: skip
    recipe = load_recipe(chain.recipe_file, [f"run={run}"])
    report = write_report(recipe, None, [], run)
    again = write_report(recipe, None, [], run)  # with a report.json in the run
    assert again.figures == report.figures
    figures, page = report.figures, Page(report.html.read_text())
    assert [(row["name"], row["fid"]) for row in figures["fid"]] == [("ours <a>", 3.0), ("training", 3.0)]
    assert set(figures["curves"][0]["plots"]) == {"blur_fid", "pool_fid"}
    assert page.headings.index("Blur and reranking") == page.headings.index("FID") + 1
    assert {"FID against blur, both sides blurred", "FID against the size of the reranking pool"} <= page.images.keys()
    assert "counts <differ>" in page.text
    assert "dalle eval-fid --page 'run/e <b>'" in page.text
    assert "dalle train-prior tiny.yaml --set 'a b'" in page.text
    assert "f" * 16 in page.text
    assert figures["samples"][0]["captions"] == 2
    assert figures["samples"][0]["settings"]["n"] == SAMPLES
    assert figures["data"]["source"] == str(chain.recipe.data.train)
    assert figures["data"]["source"] in page.text


def test_the_codebooks_use_and_psnr_are_those_of_the_files(chain: TinyChain, tmp_path: Path) -> None:
    figures = write_report(chain.recipe, None, [], tmp_path).figures
    tokens = TokenReader(chain.places.tokens).read("image", np.arange(40))
    counts = np.bincount(tokens.ravel(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    assert figures["codebook"]["dead"] == int((counts == 0).sum())
    assert figures["codebook"]["perplexity"] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), abs=1e-3)
    # The run's validation measured the same pictures: its first eight held-out ones.
    validation = figures["stages"]["dvae"]["validation"]["psnr"]
    assert figures["reconstructions"]["held_out"]
    assert float(np.mean(figures["reconstructions"]["psnr"][:8])) == pytest.approx(validation, abs=0.01)
    similarity = figures["stages"]["dvae"]["validation"]["ssim"]
    assert float(np.mean(figures["reconstructions"]["ssim"][:8])) == pytest.approx(similarity, abs=1e-4)


def test_the_same_run_gives_the_same_bytes(chain: TinyChain, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(chain.recipe, chain.ranked, [], tmp_path / name)
    assert (tmp_path / "one/report.html").read_bytes() == (tmp_path / "two/report.html").read_bytes()


def test_other_captions_are_shown_beside_their_true_pictures(chain: TinyChain, tmp_path: Path) -> None:
    reader = TokenReader(chain.places.tokens)
    captions = reader.strings("caption", range(40))
    source = open_source(str(chain.recipe.data.train))
    found = true_pictures([captions[7].upper(), "a cat"], reader, source, 32, 10**6)
    assert list(found) == [captions[7].upper()]
    row = captions.index(captions[7])
    np.testing.assert_array_equal(found[captions[7].upper()], np.asarray(decode_image(source.image_bytes(row))))

    lines = [json.loads(line) for line in chain.ranked.read_text().splitlines()]
    cats = tmp_path / "cats.jsonl"
    cats.write_text("".join(json.dumps({**line, "prompt": "a cat <b>"}) + "\n" for line in lines))
    report = write_report(chain.recipe, cats, [], tmp_path)
    assert report.figures["oracle"] is None
    assert "1 captions drawn" in report.figures["result"]
    page = Page(report.html.read_text())
    assert "Captions drawn right" not in page.headings
    assert "Accuracy and reranking" not in page.headings


def test_pools_cut_to_their_best_and_strange_captions_are_told(chain: TinyChain, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in chain.ranked.read_text().splitlines()]
    cut = tmp_path / "cut.jsonl"
    last = next(line for line in lines if line["prompt"] == SEEN and line["index"] == SAMPLES - 1)
    kept = [last, {**last, "prompt": "a cat"}]
    cut.write_text("".join(json.dumps(line) + "\n" for line in kept))
    report = write_report(chain.recipe, cut, [], tmp_path)
    warnings = report.figures["oracle"]["warnings"]
    assert len(warnings) == 2
    assert "1 captions are not of the shapes world" in warnings[0]
    assert "--top" in warnings[1]
    assert report.figures["oracle"]["groups"]["seen pairs"]["single"] is None
    assert warnings[1] in Page(report.html.read_text()).text


def test_stages_that_are_missing_or_damaged_are_named(chain: TinyChain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "prior" / "step-00000001").mkdir(parents=True)
    (run / "prior" / "step-00000001" / "manifest.json").write_text("{")
    (run / "clip").mkdir()
    (run / "tokens.zarr").mkdir()
    recipe = load_recipe(chain.recipe_file, [f"run={run}", "data.train=/nowhere"])
    with pytest.raises(UserError, match="no stage has run yet"):
        write_report(recipe, None, [], run)
    report = write_report(recipe, chain.ranked, [], run)
    told = "\n".join(report.figures["missing"])
    for expected in ("no tokenizer", "token store cannot be read", "no dVAE", "prior cannot be read",
                     "CLIP cannot be read", "training pictures cannot be read"):  # fmt: skip
        assert expected in told
    page = Page(report.html.read_text())
    assert all(text in page.text for text in report.figures["missing"])
    assert report.figures["reconstructions"] is None
    assert report.figures["codebook"] is None


def test_artifacts_of_another_chain_are_marked(chain: TinyChain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain.places.root, run)
    manifest = next((run / "prior").glob("step-*")) / "manifest.json"
    values = json.loads(manifest.read_text())
    values["belongs"]["dvae"] = "f" * 64
    manifest.write_text(json.dumps(values))
    report = write_report(load_recipe(chain.recipe_file, [f"run={run}"]), None, [], run)
    prior = next(row for row in report.figures["artifacts"] if row["artifact"] == "prior")
    assert {item["role"]: item["in_this_run"] for item in prior["belongs"]} == {"dvae": False, "tokenizer": True}
    assert "✗" in Page(report.html.read_text()).text


def test_wrong_files_are_refused_in_one_line(chain: TinyChain, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="holds no sample"):
        write_report(chain.recipe, tmp_path / "empty.jsonl", [], tmp_path)
    with pytest.raises(UserError, match=r"absent\.jsonl: cannot be read"):
        write_report(chain.recipe, tmp_path / "absent.jsonl", [], tmp_path)
    with pytest.raises(UserError, match=r"list\.json: is not a file of dalle eval-fid"):
        write_report(chain.recipe, None, [tmp_path / "list.json"], tmp_path)
    line = json.loads(chain.ranked.read_text().splitlines()[0])
    (tmp_path / "moved.jsonl").write_text(json.dumps({**line, "png": str(tmp_path / "gone.png")}))
    with pytest.raises(UserError, match=r"gone\.png: the sample's picture is missing"):
        write_report(chain.recipe, tmp_path / "moved.jsonl", [], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_prints_the_place_and_a_table(chain: TinyChain, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["report", str(chain.recipe_file), "--ranked", str(chain.ranked), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "o" / "report.html")
    assert "Captions drawn right" in result.stderr
    assert "PSNR" in result.stderr
    nothing = CliRunner().invoke(app, ["report", str(write_recipe(tmp_path))])
    assert isinstance(nothing.exception, UserError)
