"""The Python interface draws and ranks what the commands draw and rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.running import ENVIRONMENT, run
from helpers.tiny_chain import HELD_OUT, SAMPLES, SEEN, TinyChain, build_chain
from PIL import Image
from pydantic import ValidationError

import dalle_cli
from dalle_cli import Pipeline
from dalle_cli.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def test_samples_and_their_ranks_are_those_of_the_commands(chain: TinyChain, tmp_path: Path) -> None:
    samples = Pipeline.open(chain.places.root).sample([SEEN, HELD_OUT], n=3, seed=7)
    drawn = run("sample", chain.places.prior, SEEN, HELD_OUT, "--n", 3, "--seed", 7, "--out", tmp_path / "drawn")
    ranked = run("rerank", "--clip", chain.places.clip, stdin=drawn.out)
    assert [(s.caption, s.index) for s in samples] == [(line["prompt"], line["index"]) for line in drawn.lines]
    for sample, line in zip(samples, drawn.lines, strict=True):
        assert sample.path.read_bytes() == Path(line["png"]).read_bytes()
        assert sample.log_likelihood == pytest.approx(line["log_likelihood"], abs=1e-3)
        assert sample.score is None
    found = samples.ranked()
    assert [(s.caption, s.index) for s in found] == [(line["prompt"], line["index"]) for line in ranked.lines]
    assert [s.score for s in found] == pytest.approx([line["score"] for line in ranked.lines], abs=1e-5)
    best = samples.best()
    assert isinstance(best, Image.Image)
    assert (best.mode, best.size) == ("RGB", (32, 32))
    assert best.tobytes() == Image.open(ranked.lines[0]["png"]).convert("RGB").tobytes()


def test_the_notebook_runs(chain: TinyChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(chain.places.root)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "pipeline.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["sheet"].size == (8 * 32, 3 * 32)
    assert len({sample.index for sample in names["ranked"]}) == 8


def test_settings_begin_from_the_recipe(chain: TinyChain) -> None:
    pipeline = Pipeline.open(chain.places.root)
    assert len(pipeline.sample(SEEN)) == SAMPLES
    likeliest = pipeline.sample(SEEN, n=2, temperature=0)
    assert likeliest[0].picture.tobytes() == likeliest[1].picture.tobytes()
    with pytest.raises(ValidationError, match="hotness"):
        pipeline.sample(SEEN, hotness=1)
    with pytest.raises(UserError, match="caption_dropout"):
        pipeline.sample(SEEN, guidance=3)


def test_a_run_without_a_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this run has no prior yet; train it with dalle train-prior"):
        Pipeline.open(tmp_path)


def test_the_package_imports_torch_only_with_the_pipeline(chain: TinyChain) -> None:
    program = (
        "import sys, dalle_cli; assert 'torch' not in sys.modules; dalle_cli.Pipeline; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.lower())
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        dalle_cli.Pipelines  # noqa: B018
