"""dalle report: page, figures and contact sheet of a whole run, and of runs that lack something."""

from __future__ import annotations

import json
import re
import shutil
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.html_page import Page
from helpers.manifests import change_manifest
from helpers.tiny_chain import HELD_OUT, SAMPLES, SEEN, TinyChain, build_chain, write_recipe
from PIL import Image
from typer.testing import CliRunner

from dalle_cli.app import app
from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.fid.figures import BlurPoint, Evaluation, PoolPoint, SystemFigures, evaluation_json
from dalle_cli.report.report import write_report
from dalle_cli.stores.provenance import read_commands, record_command
from dalle_cli.stores.tokens import TokenReader


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def write_fid(folder: Path, name: str, features: str, score: float | None = None) -> Path:
    figures = SystemFigures(
        name="generated", generated="g <x>", fid=12.34, kid_mean=0.01, kid_subset_size=90, kid_subsets=100,
        score=score, n_generated=100, n_reference=90, feature_dimensions=3, warnings=["few <pictures>"],
    )  # fmt: skip
    evaluation = Evaluation(reference="r", size=32, features=features, score_name="clip_is", systems=[figures])
    file = folder / name
    file.write_text(json.dumps(evaluation_json(evaluation)))
    return file


def test_the_report_of_a_whole_chain(chain: TinyChain, tmp_path: Path) -> None:
    fids = [
        write_fid(tmp_path, "a.json", "clip-image runs/clip", 2.5),
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
    assert page.text.count("✓") == 9
    assert "✗" not in page.text
    assert len(page.images) == 2 + 2 + 1 + 7
    drawings = re.findall(r'download="(\w+)\.svg" href="data:image/svg\+xml;base64,([^"]+)"', text)
    assert {"bars", "pool_size", "codebook", "elbo_dvae", "loss_prior", "loss_clip"} <= dict(drawings).keys()
    for _, svg in drawings:
        assert ElementTree.fromstring(b64decode(svg)).tag.endswith("svg")

    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures == json.loads(json.dumps(report.figures.as_json()))
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
    point: dict[str, Any] = {"fid": 3.0, "fid_error": 0.5, "kid_mean": 0.1, "kid_subset_size": 4, "kid_subsets": 1,
                             "precision": 0.5, "recall": 0.5, "n_generated": 4, "n_reference": 5,
                             "feature_dimensions": 2}  # fmt: skip
    systems = [
        SystemFigures(
            name=name,
            generated=name,
            **point,
            warnings=["few"],
            blur=[BlurPoint(radius=radius, **point) for radius in (0.0, 2.0)],
            pool=[PoolPoint(size, 4, 2, 3.0, 0.5) for size in (1, 2)] if name == "ours <a>" else [],
        )
        for name in ("ours <a>", "training")
    ]
    evaluation = evaluation_json(
        Evaluation(
            command="dalle eval-fid --page 'run/e <b>'",
            reference="seen",
            size=32,
            features="clip-image x",
            score_name="clip_is",
            bootstrap=2,
            systems=systems,
            warnings=["counts <differ>"],
        )
    )
    (run / "evaluation").mkdir()
    (run / "evaluation" / "figures.json").write_text(json.dumps(evaluation))
    (run / "fid.json").write_text(json.dumps(evaluation))  # the same command's --out
    # An evaluation of an earlier version is passed over.
    (run / "old.json").write_text(json.dumps({"format": "dalle-eval-fid", "version": 1, "fid": 3.0}))
    prior = next((run / "prior").glob("step-*"))
    command = ["dalle", "train-prior", "tiny.yaml", "--set", "a b"]
    with mock.patch.object(sys, "argv", command):
        record_command(prior, "f" * 64)
        record_command(prior, "f" * 64)
        record_command(run / "tokenizer" / "tokenizer.json")
        record_command(run / "samples" / "one")
        record_command(run / "samples" / "two.parts" / "samples-0001-of-0002")
    with (run / "commands.jsonl").open("a") as journal:
        journal.write('{"artifact": "half')
    assert [line["artifact"] for line in read_commands(run)] == [
        "prior/step-00000002", "tokenizer/tokenizer.json", "samples/one", "samples/two.parts/samples-0001-of-0002",
    ]  # fmt: skip
    recipe = load_recipe(chain.recipe_file, [f"run={run}"])
    report = write_report(recipe, None, [], run)
    again = write_report(recipe, None, [], run)  # with a report.json in the run
    assert again.figures == report.figures
    figures, page = report.figures, Page(report.html.read_text())
    assert [(row["name"], row["fid"]) for row in figures.as_json()["fid"]] == [("ours <a>", 3.0), ("training", 3.0)]
    assert set(figures.curves[0].plots) == {"blur_fid", "pool_fid"}
    assert page.headings.index("Blur and reranking") == page.headings.index("FID") + 1
    assert {"FID against blur, both sides blurred", "FID against the size of the reranking pool"} <= page.images.keys()
    assert "counts <differ>" in page.text
    assert "dalle eval-fid --page 'run/e <b>'" in page.text
    assert "dalle train-prior tiny.yaml --set 'a b'" in page.text
    assert "f" * 16 in page.text
    assert figures.samples[0].captions == 2
    assert figures.samples[0].settings["n"] == SAMPLES
    assert figures.data.source == str(chain.recipe.data.train)
    assert figures.data.source in page.text


def test_use_of_the_codebook_and_psnr_are_those_of_the_files(chain: TinyChain, tmp_path: Path) -> None:
    figures = write_report(chain.recipe, None, [], tmp_path).figures
    tokens = TokenReader(chain.places.tokens).read("image", np.arange(40))
    counts = np.bincount(tokens.ravel(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    assert figures.codebook.dead == int((counts == 0).sum())
    assert figures.codebook.perplexity == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), abs=1e-3)
    # The run's last validation measured the same pictures, the first eight that are held out.
    validation = figures.stages["dvae"].validation["psnr"]
    assert figures.reconstructions.held_out
    assert float(np.mean(figures.reconstructions.psnr[:8])) == pytest.approx(validation, abs=0.01)
    similarity = figures.stages["dvae"].validation["ssim"]
    assert float(np.mean(figures.reconstructions.ssim[:8])) == pytest.approx(similarity, abs=1e-4)


def test_the_same_run_gives_the_same_bytes(chain: TinyChain, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(chain.recipe, chain.ranked, [], tmp_path / name)
    assert (tmp_path / "one/report.html").read_bytes() == (tmp_path / "two/report.html").read_bytes()


def test_captions_of_no_shapes_world_are_not_judged(chain: TinyChain, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in chain.ranked.read_text().splitlines()]
    cats = tmp_path / "cats.jsonl"
    cats.write_text("".join(json.dumps({**line, "prompt": "a cat <b>"}) + "\n" for line in lines))
    report = write_report(chain.recipe, cats, [], tmp_path)
    assert report.figures.oracle is None
    assert "1 captions drawn" in report.figures.result
    page = Page(report.html.read_text())
    assert "Captions drawn right" not in page.headings
    assert "Accuracy and reranking" not in page.headings


def test_warnings_name_pools_cut_to_their_best_and_captions_that_are_not_judged(
    chain: TinyChain, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in chain.ranked.read_text().splitlines()]
    cut = tmp_path / "cut.jsonl"
    last = next(line for line in lines if line["prompt"] == SEEN and line["index"] == SAMPLES - 1)
    best = [last, {**last, "prompt": "a cat"}]
    cut.write_text("".join(json.dumps(line) + "\n" for line in best))
    report = write_report(chain.recipe, cut, [], tmp_path)
    warnings = report.figures.oracle.warnings
    assert len(warnings) == 2
    assert "1 captions are not of the shapes world" in warnings[0]
    assert "--top" in warnings[1]
    assert report.figures.oracle.groups["seen pairs"].single is None
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
    missing = "\n".join(report.figures.missing)
    for expected in ("no tokenizer", "token store cannot be read", "no dVAE", "prior cannot be read",
                     "CLIP cannot be read", "training pictures cannot be read"):  # fmt: skip
        assert expected in missing
    page = Page(report.html.read_text())
    assert all(text in page.text for text in report.figures.missing)
    assert report.figures.reconstructions is None
    assert report.figures.codebook is None


def test_artifacts_of_another_chain_are_marked(chain: TinyChain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain.places.root, run)
    step = next((run / "prior").glob("step-*"))
    change_manifest(step, lambda manifest: manifest["belongs"].update(dvae="f" * 64))
    report = write_report(load_recipe(chain.recipe_file, [f"run={run}"]), None, [], run)
    prior = next(row for row in report.figures.artifacts if row.artifact == "prior")
    assert {item.role: item.in_this_run for item in prior.belongs} == {"dvae": False, "tokenizer": True, "source": True}
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
    with pytest.raises(UserError, match=r"gone\.png: cannot be read as a picture"):
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
