from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.generated_pictures import noise, system, write_folder, write_lines
from helpers.scorers import CLASSES, ColourScorer

from dalle_cli.fid.comparison import Settings, compare_systems
from dalle_cli.fid.features import Features, clip_features
from dalle_cli.fid.figures import Evaluation, evaluation_json, read_evaluation
from dalle_cli.fid.page import choose_grid, true_pictures_of, write_evaluation
from dalle_cli.fid.pictures import open_pictures

NAME = r"=ours <x> $\frac{"
"""A system's name that is a formula for a spreadsheet, a tag for a browser and broken mathematics for Matplotlib."""


@pytest.fixture(scope="module")
def features() -> Features:
    return clip_features(ColourScorer(), CLASSES)


def test_the_page_has_figures_curves_and_pictures_side_by_side(features: Features, tmp_path: Path) -> None:
    prompts = ["1", "2", "5"]
    ours = system(NAME, write_lines(tmp_path / "ours", prompts, 2))
    gan = system("gan", write_folder(tmp_path / "gan", 6, 30))
    real = open_pictures(str(write_folder(tmp_path / "real", 9, 60)), 8)
    figures, warnings = compare_systems([ours, gan], real, features, Settings([0, 1], [1, 2], 2, 3), tmp_path / "cache")
    evaluation = Evaluation(
        command="dalle eval-fid <y>",
        reference="real",
        size=8,
        bootstrap=3,
        features=features.name,
        score_name=features.score_name,
        systems=figures,
        warnings=warnings,
    )
    grid = choose_grid([ours, gan], true_pictures_of(None, real), 2, seed=0)
    assert len(grid) == 2
    assert {row.caption for row in grid} < set(prompts)
    row = grid[0]
    best, generated, true = row.pictures
    place = prompts.index(row.caption)
    np.testing.assert_array_equal(best, np.asarray(noise(1000 + 2 * place + 1)))
    np.testing.assert_array_equal(generated, np.asarray(noise(30 + int(row.caption))))
    np.testing.assert_array_equal(true, np.asarray(noise(60 + int(row.caption))))
    page = write_evaluation(evaluation, grid, tmp_path / "out")
    text = page.read_text()
    assert text.count("<img ") == 4 + 6
    assert "http:" not in text
    assert "https:" not in text
    assert "Content-Security-Policy" in text
    assert "ours &lt;x&gt;" in text
    assert "dalle eval-fid &lt;y&gt;" in text
    assert "<x>" not in text
    assert "by clip-image colours" in text
    assert text.count('<th class="number">') == 6
    assert "never with published ones" in text
    assert "Side by side" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {
        f"{name}.{kind}" for name in ("blur_fid", "blur_score", "pool_fid", "pool_score") for kind in ("png", "svg")
    }
    assert names == plots | {"figures.json", "figures.csv", "index.html"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "figures.csv").read_text())))
    ours_fid = [r for r in rows if (r["system"], r["metric"]) == (f"'{NAME}", "fid")]
    assert [(r["curve"], r["x"]) for r in ours_fid] == [
        ("none", ""), ("blur", "0"), ("blur", "1"), ("pool", "1"), ("pool", "2"),
    ]  # fmt: skip
    assert float(ours_fid[0]["value"]) == figures[0].fid
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written == json.loads(json.dumps(evaluation_json(evaluation)))
    assert read_evaluation(written) == evaluation
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_evaluation(evaluation, grid, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
